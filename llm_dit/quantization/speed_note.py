"""Whether a method is expected to be slower than bf16 on the card at hand, and what would be faster.

The figures are `llm-dit bench speed`'s and `llm-dit bench checkpoint`'s on an H200, klein-9B, eager (tables in README.md).
"""

from __future__ import annotations

from typing import Final

from .hardware import Hardware
from .methods import Method

SIXTEEN_BIT_TIME: Final = 1.04
"""Of a step whose quantized weights multiply in 16 bits, bf16 being 1."""


def speed_note(method: Method, granularity: str | None, backend: str | None, hardware: Hardware) -> str:
    """One sentence for the report of a denoiser, or "" where nothing faster is known.

    Args:
        granularity: of an fp8 method, else None.
        backend: "torchao", "layerwise" or "checkpoint".
    """
    if method.make_config is None or hardware.capability is None:
        return ""
    if backend == "layerwise":
        return (
            "layerwise casting copies every weight to 16 bits in each step, which took 1.16 times as long as bf16: "
            "'fp8-weight-only' with backend 'torchao' is as small, faster and closer to bf16"
        )
    if method.quantizes_activations:
        slow = granularity == "per-tensor"
        return "per-tensor scales are multiplied without the fused kernels: granularity 'per-row' is faster" if slow else ""
    slower = f"{method.name} multiplies in 16 bits, which took {SIXTEEN_BIT_TIME} times as long as bf16"
    faster = "'fp8-dynamic' is the faster choice on this card"
    if not hardware.has_fp8:
        faster = "on this card 'none' is the faster choice where bf16 fits"
    elif method.name == "int4":
        faster = "set_int4_compute(transformer, 'fp8') is faster at the same size, 'fp8-dynamic' at twice the size"
    return f"{slower}: {faster}"
