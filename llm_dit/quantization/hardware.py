"""What the card can do, and which method suits it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .methods import Method  # whose tensors ask here where they are quantized

FP8_CAPABILITY = (8, 9)
"""Ada (RTX 40, L4) and Hopper were the first with fp8 tensor cores; `torch._scaled_mm` asks for the same."""


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: as the driver names it, or "CPU".
        capability: CUDA compute capability, or None without CUDA.
        memory_bytes: memory of the card, 0 without CUDA.
    """

    name: str
    capability: tuple[int, int] | None
    memory_bytes: int

    @property
    def has_fp8(self) -> bool:
        return self.capability is not None and self.capability >= FP8_CAPABILITY

    @property
    def recommended_method(self) -> str:
        """The fastest of 8 bits: "fp8-dynamic" where there are fp8 tensor cores, else "int8"."""
        return "fp8-dynamic" if self.has_fp8 else "int8"


def current_device() -> torch.device:
    """The current CUDA device with its number, or the CPU: diffusers takes "cuda" without one for the first GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def detect_hardware() -> Hardware:
    """The current CUDA device, or the CPU."""
    if not torch.cuda.is_available():
        return Hardware("CPU", None, 0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Hardware(properties.name, (properties.major, properties.minor), properties.total_memory)


def check_fp8_support() -> bool:
    """True if the current CUDA device has fp8 tensor cores (capability >= 8.9); False without CUDA."""
    return detect_hardware().has_fp8


def get_recommended_method() -> str:
    """`fp8-dynamic` on a CUDA device of capability >= 8.9, else `int8`."""
    return detect_hardware().recommended_method


@cache
def cpu_multiplies_row_scaled_fp8() -> bool:
    """True if `torch._scaled_mm` takes per-row scales on the CPU: torch 2.13 does, 2.11 does not. Tried once."""
    left = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(left, left.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def require_support(method: Method, granularity: str = "per-row", dtype: torch.dtype | None = None) -> None:
    """Raises ValueError if the current device cannot run `method`, naming the one to use instead."""
    if (reason := lack_of_support(method, granularity, dtype)) is not None:
        raise ValueError(reason)


def lack_of_support(method: Method, granularity: str = "per-row", dtype: torch.dtype | None = None) -> str | None:
    """Why the current device cannot run `method`, and which to use instead; None if it can.

    Without CUDA every method runs, slowly and for tests, if torch has the kernel.

    Args:
        dtype: the dtype of the weights, where it is known.
    """
    hardware = detect_hardware()
    if not method.fp8:
        return None
    if hardware.capability is None:
        if method.quantizes_activations and granularity == "per-row" and not cpu_multiplies_row_scaled_fp8():
            return (
                f"torch {torch.__version__} cannot multiply fp8 with per-row scales on the CPU, and there is no CUDA device: use "
                "granularity 'per-tensor', 'fp8-weight-only', or a newer torch (2.13 can)"
            )
        return None
    if not hardware.has_fp8:
        major, minor = hardware.capability
        return (
            f"{method.name} needs a CUDA device of compute capability 8.9 or newer, and {hardware.name} has "
            f"{major}.{minor}: use {get_recommended_method()!r} instead"
        )
    half = dtype is not None and dtype != torch.bfloat16
    if method.quantizes_activations and granularity == "per-row" and half:
        return (
            f"{method.name} with per-row scales computes in bfloat16 on CUDA, and the weights are {dtype}: load with "
            "torch_dtype=torch.bfloat16, or use granularity 'per-tensor'"
        )
    return None
