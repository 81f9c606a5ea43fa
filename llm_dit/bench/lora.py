"""Fusing LoRAs into a quantized transformer: seconds, and device memory above what is held already.

The transformer has random weights at the published geometry; each LoRA has rank 16 in every quantized Linear of its blocks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from ..names import check_name
from ..quantization import METHODS
from .checkpoint import build_bf16
from .fresh import FreshProcessError, in_fresh_process
from .geometry import check_geometry
from .results import Columns, Job, Row
from .timing import GIB, synchronize

SOURCES: Final = ("checkpoint", "quantized")
"""Whether fusing starts from the bf16 weights, read again, or from quantized weights that it keeps on the host."""
COUNTS: Final = (1, 2, 4)
RANK: Final = 16
COLUMNS: Final[Columns] = (
    ("geometry", ""),
    ("method", ""),
    ("source", ""),
    ("loras", "d"),
    ("layers", "d"),
    ("fuse_s", ".2f"),
    ("unfuse_s", ".2f"),
    ("fuse_again_s", ".2f"),
    ("peak_over_start_gib", ".3f"),
    ("largest_layer_gib", ".3f"),
    ("same_bits", ""),
)


@dataclass(frozen=True)
class Case:
    """One transformer and a number of LoRAs."""

    geometry: str
    method: str
    source: str
    loras: int


def plan(geometries: Sequence[str], methods: Sequence[str], folder: Path, timeout_s: float = 900) -> Job:
    """All methods x sources x numbers of LoRAs; the bf16 model lies in `folder` while it runs.

    Raises:
        ValueError: for an unknown name.
    """
    for name in geometries:
        check_geometry(name)
    for name in methods:
        check_name(name, tuple(METHODS), "method")
    cases = [Case(g, m, s, n) for g in geometries for m in methods for s in SOURCES for n in COUNTS]
    return Job(cases, lambda wanted: _run(wanted, folder, timeout_s), COLUMNS)


def _run(cases: Sequence[Case], folder: Path, timeout_s: float) -> Iterator[Row]:
    for geometry in dict.fromkeys(case.geometry for case in cases):
        place = folder / geometry
        try:
            in_fresh_process(build_bf16, place, geometry, timeout_s=timeout_s)
            ours = [case for case in cases if case.geometry == geometry]
            for method, source in dict.fromkeys((case.method, case.source) for case in ours):
                group = [case for case in ours if (case.method, case.source) == (method, source)]
                yield from _measured(group, place, timeout_s)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _measured(cases: Sequence[Case], folder: Path, timeout_s: float) -> list[Row]:
    try:
        return in_fresh_process(measure, cases, folder, timeout_s=timeout_s)
    except FreshProcessError as error:
        return [{**asdict(case), "error": str(error)} for case in cases]


def measure(cases: Sequence[Case], folder: Path) -> list[Row]:
    """The rows of cases that differ in the number of LoRAs alone, in this process."""
    from ..load import load_pipeline
    from ..quantization import detect_hardware

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keywords = {"device_map": "cuda"} if device.type == "cuda" else {}
    pipe = load_pipeline(folder, quantization_transformer=cases[0].method, torch_dtype=torch.bfloat16, **keywords)
    if cases[0].source == "quantized":
        pipe.transformer.register_to_config(_name_or_path="")
    targets = [name for name, module in pipe.transformer.named_modules() if _in_a_block(name, module)]
    shape = max((pipe.transformer.get_submodule(name).weight.shape for name in targets), key=lambda shape: shape.numel())
    largest = shape.numel() * (2 + METHODS[cases[0].method].bytes_per_weight) / GIB
    common = {"layers": len(targets), "largest_layer_gib": largest, "device": detect_hardware().name, "torch": torch.__version__}
    return [{**asdict(case), **_one(pipe, case.loras, targets, device), **common} for case in cases]


def _in_a_block(name: str, module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor) and any(map(str.isdigit, name.split(".")))
    )


def _one(pipe: Any, count: int, targets: Sequence[str], device: torch.device) -> Row:
    for index in range(count):
        pipe.load_lora_weights(_random_lora(pipe.transformer, targets, index), adapter_name=f"lora{index}")
    pipe.set_adapters([f"lora{index}" for index in range(count)], [1.0] * count)
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    fuse_s = _timed(pipe.fuse_lora, device)
    first = _bits(pipe.transformer, targets[0])
    unfuse_s = _timed(pipe.unfuse_lora, device)
    again_s = _timed(pipe.fuse_lora, device)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if device.type == "cuda" else None
    same = bool(torch.equal(first, _bits(pipe.transformer, targets[0])))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return {
        "fuse_s": fuse_s,
        "unfuse_s": unfuse_s,
        "fuse_again_s": again_s,
        "peak_over_start_gib": peak,
        "same_bits": same,
    }


def _random_lora(model: nn.Module, targets: Sequence[str], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in targets:
        linear: Any = model.get_submodule(name)
        for part, shape in (("A", (RANK, linear.in_features)), ("B", (linear.out_features, RANK))):
            state[f"transformer.{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    return state


def _timed(function: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _bits(model: nn.Module, name: str) -> Tensor:
    layer: Any = model.get_submodule(name)
    return layer.get_base_layer().weight.qdata.view(torch.uint8).clone()
