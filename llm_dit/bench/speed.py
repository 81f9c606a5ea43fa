"""How fast a transformer runs one step: our methods and modes beside stock torchao, diffusers and SDNQ.

Every process measures the bf16 model in eager mode first; ratios and errors of what it measures then are against that.
It serves one case (`fresh`), or all cases of one geometry, the model built anew for each: the weights come from a seed,
on the device, in well under a second.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..names import check_name
from ..quantization import detect_hardware, model_bytes
from .floor import count_flops, floor_ms, measure_rates
from .geometry import GEOMETRIES, Geometry, check_geometry
from .implementations import (
    FP8_MATMUL,
    MODES,
    PREPARE,
    activate,
    available_implementations,
    exists,
    method_names,
)
from .kernels import kernel_times
from .results import SPEED_COLUMNS, Job, Row, Selection
from .timing import GIB, Timing, measure
from .worker import FATAL, ROW, emit, messages


@dataclass(frozen=True)
class Case:
    """One measurement to make; the names are those of `GEOMETRIES`, `PREPARE` and `MODES`."""

    geometry: str
    implementation: str
    method: str
    mode: str


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        steps: timed forwards.
        warmups: forwards before them, the first call included.
        fresh: a process for every case rather than one for each geometry, where kernels that an earlier case compiled may
            still be in memory and shorten `first_call_s`.
        timeout_s: seconds after which a case that has not reported is given up.
        profile: on a GPU, tell where the time of one more forward goes; `kernels_ms` of the rows.
    """

    steps: int = 10
    warmups: int = 3
    fresh: bool = True
    timeout_s: float = 900.0
    profile: bool = False


def plan(
    selection: Selection,
    steps: int = Options.steps,
    warmups: int = Options.warmups,
    fresh: bool = Options.fresh,
    timeout_s: float = Options.timeout_s,
    profile: bool = Options.profile,
) -> Job:
    """All combinations of what is named that exist; an empty sequence stands for all there are.

    Without a geometry it is klein-9b on a GPU and tiny-klein elsewhere. The other arguments are those of `Options`.

    Raises:
        ValueError: for an unknown name, or if nothing is left.
    """
    geometries = selection.geometries or ("klein-9b" if torch.cuda.is_available() else "tiny-klein",)
    implementations = selection.implementations or available_implementations()
    methods, modes = selection.methods or method_names(), selection.modes or MODES
    for name in geometries:
        check_geometry(name)
    for names, valid, what in (
        (implementations, available_implementations(), "implementation"),
        (methods, method_names(), "method"),
        (modes, MODES, "mode"),
    ):
        for name in names:
            check_name(name, valid, what)
    cases = (Case(*names) for names in product(geometries, implementations, methods, modes))
    chosen = tuple(case for case in cases if exists(case.implementation, case.method, case.mode))
    if not chosen:
        raise ValueError("no such case: torchao has no graph mode, layerwise casting and SDNQ are measured in eager mode only")
    return Job(chosen, partial(run, options=Options(steps, warmups, fresh, timeout_s, profile)), SPEED_COLUMNS)


def run(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """Measures each case in a process of its own or of its geometry, and yields its row, failed ones with `error`.

    A process that dies or hangs takes the case with it that it was at; the others go on in another.
    """
    for _, group in groupby(cases, lambda case: case.geometry):
        pending = list(group)
        while pending:
            batch = pending[:1] if options.fresh else pending
            specification = {"cases": [asdict(case) for case in batch], "options": asdict(options)}
            for message in messages("llm_dit.bench.speed", specification, options.timeout_s):
                if message.kind == ROW:
                    pending.pop(0)
                    yield message.value
                    continue
                lost = batch if message.kind == FATAL else pending[:1]
                pending = [case for case in pending if case not in lost]
                yield from (failed(case, message.value) for case in lost)


def failed(case: Case, error: str) -> Row:
    """The row of a case that could not be measured."""
    return {**asdict(case), "error": error, "device": detect_hardware().name, "torch": torch.__version__}


@dataclass(frozen=True)
class _Bench:
    """What the cases of one process are measured against."""

    geometry: Geometry
    device: torch.device
    options: Options
    floors: Mapping[bool, float]

    def forward(self, model: nn.Module, mode: str) -> Timing:
        """Times `model` in a mode; the result is the output, flat and float32 on the CPU."""
        inputs = self.geometry.inputs(model, self.device)
        activated = mode == "eager"

        def step() -> Any:
            nonlocal activated
            if not activated:
                activated = True
                activate(model, mode)
            return model(**inputs)

        with torch.no_grad():
            timing = measure(step, self.device, self.options.warmups, self.options.steps)
            kernels = kernel_times(step) if self.options.profile and self.device.type == "cuda" else {}
        return replace(timing, result=flat(timing.result), kernels_ms=kernels)


def flat(output: Any) -> Tensor:
    """All tensors of an output as one float32 vector on the CPU.

    Raises:
        ValueError: if it holds NaN or infinity.
    """
    flat = torch.cat([leaf.detach().float().cpu().flatten() for leaf in tree_leaves(output) if torch.is_tensor(leaf)])
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("the output is not finite")
    return flat


def work(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """Measures cases of one geometry in this process, bf16 eager first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometry = GEOMETRIES[cases[0].geometry]
    flops, rates = count_flops(geometry), measure_rates(device)
    bench = _Bench(geometry, device, options, {fp8: floor_ms(flops, rates, fp8) for fp8 in (False, True)})
    model = geometry.build(device)
    bf16 = bench.forward(model, "eager")
    size = model_bytes(model)
    del model
    for case in cases:
        if (case.implementation, case.method, case.mode) == ("llm-dit", "none", "eager"):
            yield _row(case, bench, bf16, bf16, size)
            continue
        _forget(device)
        try:
            row = _measure(case, bench, bf16)
        except Exception as error:
            row = failed(case, _told(error))
        yield row


def _measure(case: Case, bench: _Bench, bf16: Timing) -> Row:
    model = PREPARE[case.implementation][case.method](bench.geometry.build(bench.device))
    size = model_bytes(model)
    _forget(bench.device)
    return _row(case, bench, bench.forward(model, case.mode), bf16, size)


def _row(case: Case, bench: _Bench, timing: Timing, bf16: Timing, size: int) -> Row:
    reference, output = bf16.result.double(), timing.result.double()
    return {
        **asdict(case),
        "ms": timing.ms,
        "spread_ms": timing.spread_ms,
        "ratio": bf16.ms / timing.ms,
        "bf16_ms": bf16.ms,
        "weights_gib": size / GIB,
        "peak_gib": timing.peak_gib,
        "first_call_s": timing.first_s,
        "relerr": float((output - reference).norm() / reference.norm()),
        "floor_ms": bench.floors[case.method in FP8_MATMUL],
        "device": detect_hardware().name,
        "torch": torch.__version__,
        **({"kernels_ms": timing.kernels_ms} if timing.kernels_ms else {}),
    }


def _forget(device: torch.device) -> None:
    """Frees what the case before left, its model, compiled code and graphs, and lets the next compile from nothing."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # Kernels that an earlier case left on disk would shorten the first call.
    cache = Path(tempfile.mkdtemp())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")


def _told(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main(specification: Mapping[str, Any]) -> None:
    """The measuring process: reports each row as it comes."""
    cases = [Case(**case) for case in specification["cases"]]
    measured = 0
    try:
        for row in work(cases, Options(**specification["options"])):
            emit(ROW, row)
            measured += 1
            if "error" in row and not _device_works():
                return  # the cases left are measured in another process
    except Exception as error:
        if not measured:
            emit(FATAL, _told(error))
        raise


def _device_works() -> bool:
    """False after an error that leaves the CUDA context of the process broken."""
    try:
        if torch.cuda.is_available():
            torch.ones(1, device="cuda").cpu()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
