"""Huge pages for large results on the host (Linux, madvise(2))."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, Final

from torch import Tensor

HUGE_PAGE: Final = 2 * 1024**2
_MADV_HUGEPAGE: Final = 14
"""<sys/mman.h> of Linux; advice only, which a system without transparent huge pages declines."""


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def advise_huge_pages(tensor: Tensor) -> None:
    """Asks for huge pages behind a tensor whose memory was not written yet."""
    advise = _madvise()
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // HUGE_PAGE * HUGE_PAGE
    if advise is not None and length > 0:
        advise(start, length, _MADV_HUGEPAGE)
