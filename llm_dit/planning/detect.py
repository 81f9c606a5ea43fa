"""The card at hand."""

from __future__ import annotations

import torch

from ..quantization import detect_hardware
from .card import Card


def card_at_hand() -> Card | None:
    """The current GPU with the memory that can still be taken of it, CUDA's own share included; None without one."""
    hardware = detect_hardware()
    if hardware.capability is None:
        return None
    free, total = torch.cuda.mem_get_info()
    used_here = torch.cuda.memory_reserved()
    return Card(hardware.name, hardware.capability, min(free + used_here, total), "GeForce" in hardware.name)
