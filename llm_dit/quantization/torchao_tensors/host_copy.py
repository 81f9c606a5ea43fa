"""Copies from host memory to host memory: torch's, and where other processes keep the cores busy, in small parts.

torch cuts a copy into one part for every core and waits for the last of them. On an idle machine nothing is faster: 18 GB were
read and quantized in 1.0 s on 16 cores, and in 1.6 to 1.9 s in parts, whose threads take turns in Python. Where anything else
runs, some core is shared, and each of torch's copies waits until the scheduler comes back to it: 7.6 ms for 16 MB instead of 1.1
(eight threads on two busy cores; 9 s for the 18 GB beside one busy process, and 3.6 in parts). A thread that is held up with a
small part holds up that part only, and half of the cores are left to others.
"""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from torch import Tensor

PART_BYTES: Final = 1024**2
MOST_THREADS: Final = 16
SLOW: Final = 4e9
"""Bytes a second below which a copy of torch's was held up: idle machines copy two to six times as fast."""
PATIENCE: Final = 8
"""So many slow copies one after the other, and the rest is copied in parts."""


class HostCopier:
    """Copies for one loading; `close` ends its threads."""

    def __init__(self) -> None:
        self._slow = 0
        self._threads: ThreadPoolExecutor | None = None

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copies `source` into `destination`, of the same shape, both on the CPU."""
        alike = destination.dtype == source.dtype and destination.is_contiguous() and source.is_contiguous()
        if alike and self._slow >= PATIENCE:
            self._copy_in_parts(destination, source)
            return
        start = time.perf_counter()
        destination.copy_(source)
        if source.nbytes >= PART_BYTES:
            slow = source.nbytes < SLOW * (time.perf_counter() - start)
            self._slow = self._slow + 1 if slow else 0

    def _copy_in_parts(self, destination: Tensor, source: Tensor) -> None:
        to, of, size = destination.data_ptr(), source.data_ptr(), source.nbytes

        def copy_part(start: int) -> None:
            ctypes.memmove(to + start, of + start, min(PART_BYTES, size - start))  # without the interpreter's lock

        if self._threads is None:
            threads = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
            self._threads = ThreadPoolExecutor(threads, thread_name_prefix="llm_dit-copy")
        for _ in self._threads.map(copy_part, range(0, size, PART_BYTES)):
            pass

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
