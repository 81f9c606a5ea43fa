"""Giving freed host memory back to the system while a model loads.

Quantizing on the CPU allocates results between short-lived chunks. glibc keeps the holes that the chunks leave, a few hundred
megabytes for a model of a gigabyte, because it returns only what lies at the end of its heap. `malloc_trim` returns holes too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

TRIM_EVERY_BYTES = 64 * 1024**2
"""Bytes quantized between two trims, each of which takes about a millisecond."""


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, or None on a system whose C library has none (musl, macOS, Windows)."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


class HostMemory:
    """Counts what was quantized on the host and trims now and then."""

    def __init__(self) -> None:
        self._pending = 0

    def quantized(self, nbytes: int) -> None:
        """Notes that `nbytes` of weights were quantized; trims when enough has come together."""
        self._pending += nbytes
        trim = _malloc_trim()
        if trim is not None and self._pending >= TRIM_EVERY_BYTES:
            trim(0)
            self._pending = 0
