"""An official-layout fp8 file against quantizing at run time and against layerwise casting: loading, memory, speed, error.

A transformer with random weights at the published geometry is saved in bf16 and converted to its authors' fp8 layout by our own
converter. Every way to load it then runs in a fresh process: the load, from page cache, and a few forwards of one step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from .fresh import FreshProcessError, in_fresh_process
from .geometry import GEOMETRIES, check_geometry
from .load import sampled_host_memory
from .results import Columns, Job, Row
from .speed import flat
from .timing import GIB, measure, synchronize

WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "bf16": {},
    "file fp8-dynamic": {"quantization": "fp8-dynamic", "transformer_file": True},
    "runtime fp8-dynamic": {"quantization": "fp8-dynamic"},
    "layerwise": {"quantization": "fp8-weight-only", "quantization_backend": "layerwise"},
    "file fp8-weight-only": {"quantization": "fp8-weight-only", "transformer_file": True},
    "runtime fp8-weight-only": {"quantization": "fp8-weight-only"},
}
"""Keyword arguments of `from_pretrained` by what the table calls them; True stands for the converted file."""
COLUMNS: Final[Columns] = (
    ("geometry", ""),
    ("way", ""),
    ("load_s", ".1f"),
    ("held_gib", ".2f"),
    ("load_peak_gib", ".2f"),
    ("host_peak_gib", ".2f"),
    ("ms", ".1f"),
    ("ratio", ".2f"),
    ("relerr", ".4f"),
)


@dataclass(frozen=True)
class Case:
    """One way to load one transformer."""

    geometry: str
    way: str


def plan(geometries: Sequence[str], folder: Path, steps: int = 5, timeout_s: float = 900) -> Job:
    """The job of `geometries`, whose files lie in `folder` while it runs.

    Raises:
        ValueError: for an unknown geometry.
    """
    for name in geometries:
        check_geometry(name)
    cases = [Case(geometry, way) for geometry in geometries for way in WAYS]
    return Job(cases, lambda wanted: _run(wanted, folder, steps, timeout_s), COLUMNS)


def _run(cases: Sequence[Case], folder: Path, steps: int, timeout_s: float) -> Iterator[Row]:
    for geometry in dict.fromkeys(case.geometry for case in cases):
        place = folder / geometry
        built = _row(build, place, geometry, timeout_s=timeout_s)
        for case in (case for case in cases if case.geometry == geometry):
            row = built if "error" in built else _row(run_way, case, place, steps, timeout_s=timeout_s)
            yield {**asdict(case), "device": row.get("device", ""), "torch": torch.__version__, **row}
        shutil.rmtree(place, ignore_errors=True)


def _row(function: Callable[..., Row], *args: Any, timeout_s: float) -> Row:
    try:
        return in_fresh_process(function, *args, timeout_s=timeout_s)
    except FreshProcessError as error:
        return {"error": str(error)}


def build_bf16(folder: Path, name: str) -> None:
    """Saves a pipeline whose transformer has the geometry, everything else tiny."""
    from ..tiny import build as build_tiny

    geometry = GEOMETRIES[name]
    if not (folder / "model_index.json").is_file():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipe = build_tiny(geometry.tiny)
        pipe.transformer = geometry.build(device)
        pipe.save_pretrained(folder, max_shard_size="5GB")


def build(folder: Path, name: str) -> Row:
    """The same, and the converted file beside it."""
    from ..checkpoints.convert import convert, layout_of

    build_bf16(folder, name)
    start = time.perf_counter()
    target = folder / "fp8.safetensors"
    if not target.exists():
        convert(folder, target, layout_of(GEOMETRIES[name].family))
    return {"convert_s": time.perf_counter() - start}


def run_way(case: Case, folder: Path, steps: int) -> Row:
    """Loads once in this process, and times a step."""
    from ..load import load_pipeline
    from ..quantization import detect_hardware

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keywords = {"torch_dtype": torch.bfloat16, **WAYS[case.way]}
    if keywords.get("transformer_file"):
        keywords["transformer_file"] = folder / "fp8.safetensors"
    if device.type == "cuda":
        keywords["device_map"] = "cuda"
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    with sampled_host_memory() as host:
        start = time.perf_counter()
        pipe = load_pipeline(folder, **keywords)
        synchronize(device)
        load_s = time.perf_counter() - start
    cuda = device.type == "cuda"
    row = {
        "device": detect_hardware().name,
        "load_s": load_s,
        "host_peak_gib": (max(host) - host[0]) / GIB,
        "load_peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "held_gib": (torch.cuda.memory_allocated() if cuda else pipe.quantization_report.bytes_after) / GIB,
    }
    inputs = GEOMETRIES[case.geometry].inputs(pipe.transformer, device)
    with torch.no_grad():
        timing = measure(lambda: pipe.transformer(**inputs), device, 3, steps)
    return {**row, **_compared(case, folder, flat(timing.result), timing.ms), "spread_ms": timing.spread_ms}


def _compared(case: Case, folder: Path, output: torch.Tensor, ms: float) -> Row:
    """Time and error against bf16, which is the first way and leaves its own here."""
    place = folder / "bf16.safetensors"
    if case.way == "bf16":
        save_file({"output": output, "ms": torch.tensor(ms)}, place)
    reference = load_file(place)
    error = (output.double() - reference["output"].double()).norm() / reference["output"].double().norm()
    return {"ms": ms, "ratio": float(reference["ms"]) / ms, "relerr": float(error)}
