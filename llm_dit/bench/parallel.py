"""More than one GPU: one large picture split between them, and a list of prompts shared out, against one GPU.

Each set of processes is started by torchrun, as a user would. What one GPU does alone is measured by process 0 of the same set
while the others wait.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from ..families import get_family
from ..forwards import Size
from ..generate import GenerateOptions, call_arguments
from ..names import check_name
from ..parallel import process_group, split_transformer, use_own_device
from ..prompts import MANIFEST, Prompt, run_prompts
from ..quantization import VALID_METHODS, detect_hardware
from .end_to_end import PROMPT, build_folder
from .fresh import FreshProcessError, in_fresh_process
from .geometry import GEOMETRIES, Geometry, check_geometry, of_size
from .implementations import PREPARE, activate
from .results import Columns, Job, Row
from .speed import flat
from .timing import Timing, measure
from .worker import FATAL, ROW, emit, messages

SPLIT: Final = "split"
SHARED: Final = "prompts"
OTHER_ATTENTION: Final[Mapping[str, str]] = {"cuda": "_native_flash", "cpu": "_native_math"}
"""By device, attention with other roundings than the default's: what two right answers differ by."""
PIXELS_A_TOKEN: Final = 16
SPLIT_GEOMETRIES: Final = ("qwen-image", "klein-9b", "klein-4b", "tiny-qwen-image", "tiny-klein")
"""Those whose latents are one sequence of tokens, as `_Split.denoised` steps through them."""
COLUMNS: Final[Columns] = (
    ("what", ""),
    ("geometry", ""),
    ("method", ""),
    ("mode", ""),
    ("how", ""),
    ("gpus", "d"),
    ("one", ".1f"),
    ("all", ".1f"),
    ("ratio", ".2f"),
    ("relerr", ".4f"),
    ("floor", ".4f"),
    ("load_s", ".1f"),
)
"""`one` and `all` are milliseconds a step, or prompts a minute."""


@dataclass(frozen=True)
class Case:
    """One comparison of one GPU with `gpus`.

    Attributes:
        what: "split", a step of a transformer, or "prompts", a list through a whole pipeline.
        geometry: name of a geometry.
        method: of the transformer.
        mode: "eager" or "compile".
        how: of a split, "ulysses" or "ring".
        gpus: processes, a GPU each.
        side, text: of a split, image tokens along a side, and text tokens.
        count, steps: of a list, its prompts and their denoising steps.
    """

    what: str
    geometry: str
    method: str
    mode: str
    how: str
    gpus: int
    side: int = 0
    text: int = 0
    count: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        folder: where the pipeline lies; kept.
        warmups, steps: forwards before the timed ones, and those.
        denoising: forwards from noise to the latents that are compared.
        timeout_s: seconds without a result after which a set of processes is given up.
    """

    folder: Path
    warmups: int = 2
    steps: int = 4
    denoising: int = 4
    timeout_s: float = 600.0


def plan(geometry: str, pipeline: str, method: str, gpus: int, pixels: int, count: int, steps: int, options: Options) -> Job:
    """The step with and without a compiler under Ulysses, then the list; on a GPU also a ring, and a text of odd length.

    Args:
        geometry: that of the split; "" for the default, as for `pipeline` and `method`, 0 for `gpus` and `pixels`.
        pipeline: the geometry of the whole pipeline.

    Raises:
        ValueError: for an unknown name, or fewer than two GPUs.
    """
    cuda = torch.cuda.is_available()
    geometry = geometry or ("qwen-image" if cuda else "tiny-qwen-image")
    pipeline = pipeline or ("klein-4b" if cuda else "tiny-z-image")
    method = check_name(method or ("fp8-dynamic" if cuda else "int8"), VALID_METHODS, "method")
    check_geometry(check_name(geometry, SPLIT_GEOMETRIES, "geometry (split)"))
    check_geometry(pipeline)
    gpus = gpus or (torch.cuda.device_count() if cuda else 2)
    if gpus < 2 or (cuda and gpus > torch.cuda.device_count()):
        raise ValueError(f"--gpus {gpus} compares nothing, or more than there is: there are {torch.cuda.device_count()} GPUs")
    text = 512 if GEOMETRIES[geometry].published else 32
    side = (pixels or (2048 if GEOMETRIES[geometry].published else 128)) // PIXELS_A_TOKEN
    split = partial(Case, SPLIT, geometry, method, gpus=gpus, side=side)
    cases = [split(mode=mode, how="ulysses", text=text) for mode in ("eager", "compile")]
    if cuda:
        cases += [split(mode="compile", how="ring", text=text), split(mode="compile", how="ulysses", text=text - 1)]
    cases.append(Case(SHARED, pipeline, method, "eager", "", gpus, count=count, steps=steps))
    return Job(cases, partial(run, options=options), COLUMNS)


def run(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """The rows of all cases: the splits by one set of processes, each list by two."""
    splits = [case for case in cases if case.what == SPLIT]
    if splits:
        rows = _launched(splits[0].gpus, {"split": [asdict(case) for case in splits]}, options)
        for case in splits:
            yield _told(case, next(rows, {"error": "the processes ended before it"}))
    for case in cases:
        if case.what == SHARED:
            try:
                yield _told(case, _compare_lists(case, options))
            except FreshProcessError as error:
                yield _told(case, {"error": str(error)})


def _told(case: Case, found: Row) -> Row:
    return {**asdict(case), **found, "device": detect_hardware().name, "torch": torch.__version__}


def _launched(processes: int, specification: Mapping[str, Any], options: Options) -> Iterator[Row]:
    """What process 0 of so many reports; the first failure ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    launcher = ("torch.distributed.run", "--nproc-per-node", str(processes), *where, "-m")
    whole = {**specification, "options": {**asdict(options), "folder": str(options.folder)}}
    for message in messages("llm_dit.bench.parallel", whole, options.timeout_s, launcher):
        yield message.value if message.kind == ROW else {"error": message.value}
        if message.kind != ROW:
            return


def _compare_lists(case: Case, options: Options) -> Row:
    """One case of a list: by one process, then by all, into folders of their own."""
    place = options.folder / case.geometry
    if not (place / "model_index.json").is_file():
        options.folder.mkdir(parents=True, exist_ok=True)
        in_fresh_process(build_folder, place, case.geometry, timeout_s=options.timeout_s)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        found = {}
        for processes in (1, case.gpus):
            output = Path(scratch) / str(processes)
            specification = {"list": asdict(case), "source": str(place), "output": str(output)}
            found[processes] = next(_launched(processes, specification, options))
            if "error" in found[processes]:
                return found[processes]
        one, every = found[1], found[case.gpus]
        files = [f"{number:04d}.png" for number in range(1, case.count + 1)]
        folders = [Path(scratch) / str(processes) for processes in found]
        same = [len({(folder / name).read_bytes() for folder in folders}) == 1 for name in files]
    return {
        "one": 60 * case.count / one["seconds"],
        "all": 60 * case.count / every["seconds"],
        "ratio": one["seconds"] / every["seconds"],
        "load_s": every["load_s"],
        "one_load_s": one["load_s"],
        "by_rank": every["by_rank"],
        "same_pictures": sum(same),
    }


@dataclass(frozen=True)
class _Split:
    """What one process of a split works with."""

    geometry: Geometry
    device: torch.device
    options: Options

    def build(self, case: Case) -> nn.Module:
        """The quantized transformer, compiled if the case says so."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        model = PREPARE["llm-dit"][case.method](self.geometry.build(self.device))
        activate(model, case.mode)
        return model

    def inputs(self, model: nn.Module, case: Case) -> Mapping[str, Any]:
        """The arguments of a step of the case's size."""
        size = Size(case.side * PIXELS_A_TOKEN, case.side * PIXELS_A_TOKEN, text=case.text)
        return of_size(self.geometry, size).inputs(model, self.device)

    def step(self, model: nn.Module, case: Case) -> tuple[Timing, Tensor]:
        """Times a forward, and the latents that a few steps from noise arrive at."""
        inputs = self.inputs(model, case)
        with torch.no_grad():
            timing = measure(lambda: model(**inputs), self.device, self.options.warmups, self.options.steps)
            return timing, self.denoised(model, inputs)

    def denoised(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Latents after Euler steps of equal length from noise, flat and float32 on the CPU."""
        latents, count = inputs["hidden_states"], self.options.denoising
        for index in range(count):
            timestep = torch.full_like(inputs["timestep"], 1 - index / count)
            latents = latents - model(**{**inputs, "hidden_states": latents, "timestep": timestep})[0] / count
        return flat(latents)


def _split_rows(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """In each process: the rows of all splits; those of process 0 count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with process_group(device):
        work = _Split(GEOMETRIES[cases[0].geometry], device, options)
        alone: dict[tuple[str, int], Row] = {}
        for case in cases:
            key = (case.mode, case.text)
            if key not in alone:
                alone[key] = _alone(work, case) if dist.get_rank() == 0 else {}
                dist.all_reduce(torch.zeros(1))  # on the host, where waiting costs nothing
            try:
                timing, latents = _together(work, case)
            except (RuntimeError, ValueError) as error:  # in all processes alike: the cases after it can be measured
                yield {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                continue
            if dist.get_rank() == 0:
                one = alone[key]
                yield {
                    "one": one["ms"],
                    "all": timing.ms,
                    "ratio": one["ms"] / timing.ms,
                    "relerr": _relative(latents, one["latents"]),
                    "floor": next(row["floor"] for row in alone.values() if "floor" in row),
                    "first_call_s": timing.first_s,
                    "one_peak_gib": one["peak_gib"],
                    "peak_gib": timing.peak_gib,
                }


def _together(work: _Split, case: Case) -> tuple[Timing, Tensor]:
    """A step of all processes, each with its part."""
    model = work.build(case)
    split_transformer(model, get_family(work.geometry.family), case.how)
    return work.step(model, case)


def _alone(work: _Split, case: Case) -> Row:
    """What one GPU takes and gives and, without a compiler, how far other attention takes it from that."""
    model = work.build(case)
    timing, latents = work.step(model, case)
    found = {"ms": timing.ms, "peak_gib": timing.peak_gib, "latents": latents}
    if case.mode != "eager":
        return found
    inputs = work.inputs(model, case)
    with torch.no_grad(), attention_backend(OTHER_ATTENTION[work.device.type]):
        return {**found, "floor": _relative(work.denoised(model, inputs), latents)}


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _list_row(case: Case, source: str, output: Path) -> Row:
    """In each process: works on the list from the moment that all have loaded and made one picture."""
    use_own_device()
    dist.init_process_group("gloo")  # for waiting; sharing out needs none
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = {"num_inference_steps": case.steps, **({} if GEOMETRIES[case.geometry].published else {"height": 64, "width": 64})}
    load = {"quantization": case.method, **({"compile": True} if case.mode == "compile" else {})}
    options = GenerateOptions(source, PROMPT, output, load, call, device=device)
    begun = 0.0

    def ready(pipe: Any) -> None:
        nonlocal begun
        pipe(**call_arguments(pipe, options))
        dist.all_reduce(torch.zeros(1))
        begun = time.time()

    try:
        ran = run_prompts([Prompt(prompt=f"{PROMPT}, number {number}") for number in range(case.count)], options, ready)
        rows = [json.loads(line) for line in (output / MANIFEST).read_text(encoding="utf-8").splitlines()]
        dist.all_reduce(torch.zeros(1))
    finally:
        dist.destroy_process_group()
    if ran.failed:
        raise RuntimeError(next(iter(ran.failed.values())))
    by_rank = [sum(row["rank"] == index for row in rows) for index in range(int(os.environ["WORLD_SIZE"]))]
    return {"seconds": max(row["ended"] for row in rows) - begun, "load_s": ran.load_seconds, "by_rank": by_rank}


def main(specification: Mapping[str, Any]) -> None:
    """One of the processes that torchrun starts; number 0 reports."""
    report: Callable[[str, Any], None] = emit if os.environ["RANK"] == "0" else lambda kind, value: None
    options = Options(**{**specification["options"], "folder": Path(specification["options"]["folder"])})
    try:
        if "split" in specification:
            for row in _split_rows([Case(**case) for case in specification["split"]], options):
                report(ROW, row)
        else:
            report(ROW, _list_row(Case(**specification["list"]), specification["source"], Path(specification["output"])))
    except Exception as error:
        report(FATAL, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
