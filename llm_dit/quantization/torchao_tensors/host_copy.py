"""Copies from host memory to host memory, in small parts that a few threads take in turn.

torch cuts a copy into one part for every core and waits for the last of them. Where anything else runs, some core is shared,
and each copy waits until the scheduler comes back to it: 7.6 ms for 16 MB instead of 1.1 (eight threads on two busy cores). A
thread that is held up here holds up its own part only, and half of the cores are left to others.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from torch import Tensor

PART_BYTES: Final = 1024**2
MOST_THREADS: Final = 16
"""As many as filled buffers when 18 GB were read and quantized in 2.3 s (benchmarks/results/load-klein-9b-h200.json)."""


class HostCopier:
    """Threads that copy; `close` ends them."""

    def __init__(self) -> None:
        threads = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="llm_dit-copy")

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copies `source` into `destination`, of the same shape, both on the CPU; other dtypes and strides are left to torch."""
        if destination.dtype != source.dtype or not (destination.is_contiguous() and source.is_contiguous()):
            destination.copy_(source)
            return
        to, of, size = destination.data_ptr(), source.data_ptr(), source.nbytes

        def copy_part(start: int) -> None:
            ctypes.memmove(to + start, of + start, min(PART_BYTES, size - start))  # without the interpreter's lock

        for _ in self._threads.map(copy_part, range(0, size, PART_BYTES)):
            pass

    def close(self) -> None:
        self._threads.shutdown()
