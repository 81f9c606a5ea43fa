"""The least time a forward can take: its floating point operations over the rates this device reaches on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..quantization import check_fp8_support
from .geometry import Geometry
from .timing import measure


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one forward.

    Attributes:
        linear: in Linears and every other matrix multiplication.
        attention: in scaled dot product attention.
    """

    linear: int
    attention: int


@dataclass(frozen=True)
class Rates:
    """Floating point operations per second measured on one large operation.

    Attributes:
        bf16: matrix multiplication in bfloat16.
        attention: scaled dot product attention in bfloat16.
        fp8: `torch._scaled_mm` with a scale per row, or None where the device has no fp8.
    """

    bf16: float
    attention: float
    fp8: float | None = None


def floor_ms(flops: Flops, rates: Rates, fp8: bool) -> float:
    """Milliseconds of one forward at these rates; `fp8` if the Linears multiply in fp8."""
    linear = rates.fp8 if fp8 and rates.fp8 else rates.bf16
    return (flops.linear / linear + flops.attention / rates.attention) * 1e3


def count_flops(geometry: Geometry) -> Flops:
    """Counts one forward on meta, where it takes a second and no memory."""
    device = torch.device("meta")
    model = geometry.build(device)
    attention = _AttentionCounter()
    with torch.no_grad(), FlopCounterMode(display=False) as rest, attention:
        model(**geometry.inputs(model, device))
    return Flops(rest.get_total_flops(), attention.flops)


class _AttentionCounter(TorchFunctionMode):
    """Counts attention and does not run it: which kernels it consists of depends on the device, and meta has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **keywords)
        given = dict(zip(("query", "key", "value"), args, strict=False)) | keywords
        query, key, value = given["query"], given["key"], given["value"]
        self.flops += sdpa_flop_count(query.shape, key.shape, value.shape)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def measure_rates(device: torch.device) -> Rates:
    """Measures the device; on the CPU with small operations, for which the figures are only an order of magnitude."""
    large = device.type == "cuda"
    size = 8192 if large else 512
    heads, tokens, width = (32, 4608, 128) if large else (4, 256, 64)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    query, key, value = (torch.randn(1, heads, tokens, width, dtype=torch.bfloat16, device=device) for _ in range(3))
    with torch.no_grad():
        bf16 = _rate(2 * size**3, lambda: left @ right, device)
        flops = sdpa_flop_count(query.shape, key.shape, value.shape)
        attention = _rate(flops, lambda: scaled_dot_product_attention(query, key, value), device)
        fp8 = _rate(2 * size**3, _fp8_product(left, right), device) if large and check_fp8_support() else None
    return Rates(bf16, attention, fp8)


def _rate(flops: int, run: Callable[[], Any], device: torch.device) -> float:
    return flops / (measure(run, device).ms / 1e3)


def _fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left @ right.T in fp8, a scale per row of each."""
    a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    rows = torch.ones((a.shape[0], 1), device=a.device)
    columns = torch.ones((1, b.shape[0]), device=b.device)
    return lambda: torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)
