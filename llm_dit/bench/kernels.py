"""Where the time of a forward goes on a GPU: kernels by kind, and how long none ran."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

KINDS: Final[Mapping[str, str]] = {
    "compiled": r"^triton_",  # first, for their names list the operators that they compute or feed
    "attention": r"flash|fmha|sdpa|attention",
    "matmul": r"gemm|nvjet|cutlass|xmma|splitk",
    "quantize": r"quantize_rows|dequantize",
    "copies": r"memcpy|memset",
}
"""By kind, what is in the names of its kernels; the first that matches counts. All others are "elementwise"."""
OTHER: Final = "elementwise"
IDLE: Final = "idle"


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name.

    Example:
        >>> kind_of("nvjet_qqtst_128x256_128x6_2x1_v_bz_coopA_TNT"), kind_of("triton_red_fused__to_copy_add_mul_3")
        ('matmul', 'compiled')
    """
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the GPU in one call of `run`, by kind, and "idle": between its first kernel and its last with none running.

    The profiler makes launches slower: what it measures of a forward that waits for the host is more idle than without.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA" and not event.is_user_annotation]
    return summarized((event.name, event.time_range.start, event.time_range.end) for event in events)


def summarized(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds by kind and idle, the largest first, of (name, start, end) in microseconds."""
    found: dict[str, float] = {}
    idle, last = 0.0, None
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + (end - start) / 1e3
        idle += max(0.0, start - last) / 1e3 if last is not None else 0.0
        last = end if last is None else max(last, end)
    return dict(sorted({**found, IDLE: idle}.items(), key=lambda item: -item[1]))
