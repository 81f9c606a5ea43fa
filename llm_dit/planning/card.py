"""Classes of cards: what decides between methods, for a card that is not at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..names import check_name
from ..quantization.hardware import FP8_CAPABILITY

_UNITS: Final = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "": 10**9}


@dataclass(frozen=True)
class Card:
    """One card, or a class of them.

    Attributes:
        name: for people.
        capability: CUDA compute capability; None for a CPU.
        memory_bytes: memory of the card; 0 where only a budget is known.
        consumer: fp8 with sums in fp32 runs at half of the tensor cores' rate, which is the rate of bf16. `torch._scaled_mm`
            sums so; Hopper and the other data centre cards do it at full rate.
    """

    name: str
    capability: tuple[int, int] | None
    memory_bytes: int = 0
    consumer: bool = False

    @property
    def has_fp8(self) -> bool:
        return self.capability is not None and self.capability >= FP8_CAPABILITY


def _gb(count: int) -> int:
    """As on the label: what CUDA sees is at least that, also where error correction takes its share (L4, L40S, T4)."""
    return count * 10**9


ANY_CARD: Final = Card("any-fp8", FP8_CAPABILITY)
"""What is planned for where only a budget is given: any card with fp8 tensor cores at full rate."""
CPU: Final = Card("CPU", None)
_ROWS: Final = (
    ANY_CARD,
    Card("t4", (7, 5), _gb(16)),
    Card("rtx-2080-ti", (7, 5), _gb(11), consumer=True),
    Card("rtx-3060", (8, 6), _gb(12), consumer=True),
    Card("rtx-3080", (8, 6), _gb(10), consumer=True),
    Card("rtx-3090", (8, 6), _gb(24), consumer=True),
    Card("rtx-4060", (8, 9), _gb(8), consumer=True),
    Card("rtx-4060-ti", (8, 9), _gb(16), consumer=True),
    Card("rtx-4070", (8, 9), _gb(12), consumer=True),
    Card("rtx-4080", (8, 9), _gb(16), consumer=True),
    Card("rtx-4090", (8, 9), _gb(24), consumer=True),
    Card("rtx-5080", (12, 0), _gb(16), consumer=True),
    Card("rtx-5090", (12, 0), _gb(32), consumer=True),
    Card("a100", (8, 0), _gb(80)),
    Card("l4", (8, 9), _gb(24)),
    Card("l40s", (8, 9), _gb(48)),
    Card("h100", (9, 0), _gb(80)),
    Card("h200", (9, 0), _gb(141)),
)
CARDS: Final[Mapping[str, Card]] = {card.name: card for card in _ROWS}
"""NVIDIA's data sheets: compute capability and memory."""
LADDER: Final = tuple(size * 10**9 for size in (8, 12, 16, 24, 32, 48, 80, 141))
"""Budgets that cards come in, in bytes."""


def get_card(name: str) -> Card:
    """The card of that name.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    return CARDS[check_name(name.lower(), tuple(CARDS), "card")]


def parse_bytes(text: str | int) -> int:
    """Bytes of "24GB" (10^9 each, as the label on a card), "22.5GiB" (2^30 each) or "24", which is in GB; a number is in bytes.

    Raises:
        ValueError: for anything else, zero and less.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 2**20:
        return text
    if isinstance(text, int):
        raise ValueError(f"a budget of {text} is a number of bytes, and less than a MiB: write it as text, such as '24GB'")
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(GB|GIB|MB|MIB|)\s*", str(text), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ValueError(f"a budget of memory is more than 0, and written 24GB or 22.5GiB, not {str(text)[:40]!r}")
    return size


def format_gb(size: int) -> str:
    """Bytes as the label on a card: "24 GB"."""
    return f"{size / 10**9:.4g} GB"
