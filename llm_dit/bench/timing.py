"""Timing a callable: CUDA events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

GIB: Final = 1024**3


@dataclass(frozen=True)
class Timing:
    """What running something several times gave.

    Attributes:
        first_s: seconds of the first call, with everything compiled, tuned and captured on the way.
        ms: median of the measured calls in milliseconds.
        spread_ms: slowest minus fastest.
        peak_gib: peak of allocated device memory from the first call on; None without a GPU.
        result: what the last call returned.
        kernels_ms: by kind of kernel, where the GPU's time went in a call of its own; empty if it was not asked for.
    """

    first_s: float
    ms: float
    spread_ms: float
    peak_gib: float | None
    result: Any
    kernels_ms: Mapping[str, float] = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Callable[[], Any], device: torch.device, warmups: int = 3, steps: int = 10) -> Timing:
    """Times `run` over `steps` calls after `warmups` (at least one: the first call is timed on its own).

    On a GPU the calls follow each other without waiting, as the steps of a pipeline do.
    """
    cuda = device.type == "cuda"
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    first = time.perf_counter() - start
    for _ in range(warmups - 1):
        result = run()
    result, samples = (_cuda_samples if cuda else _host_samples)(run, steps)
    peak = torch.cuda.max_memory_allocated(device) / GIB if cuda else None
    return Timing(first, statistics.median(samples), max(samples) - min(samples), peak, result)


def _host_samples(run: Callable[[], Any], steps: int) -> tuple[Any, list[float]]:
    result, samples = None, []
    for _ in range(steps):
        start = time.perf_counter()
        result = run()
        samples.append((time.perf_counter() - start) * 1e3)
    return result, samples


def _cuda_samples(run: Callable[[], Any], steps: int) -> tuple[Any, list[float]]:
    result = None
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    torch.cuda.synchronize()
    for start, end in events:
        result = None  # the last output is freed before the next is made, as in a pipeline
        start.record()
        result = run()
        end.record()
    torch.cuda.synchronize()
    return result, [start.elapsed_time(end) for start, end in events]
