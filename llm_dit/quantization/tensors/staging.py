"""Chunks of weights to a GPU and back through page-locked memory.

A checkpoint is mapped, not read: a copy of such memory to a GPU goes through the driver's own staging on one thread. Two
buffers of ours are filled with all threads, and one is on its way while the other is filled.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Staging:
    """Buffers for one GPU, made at their first use and grown when a larger chunk comes; one per thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._events = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def upload(self, part: Tensor) -> Tensor:
        """`part`, which is on the CPU, as a tensor on the device."""
        staged, event = self._next(part)
        staged.copy_(part)
        on_device = staged.to(self.device, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return on_device

    def download(self, part: Tensor, destination: Tensor) -> None:
        """Copies `part`, which is on the device, into `destination` on the CPU."""
        staged, event = self._next(part)
        staged.copy_(part, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()
        destination.copy_(staged)

    def _next(self, part: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """The buffer whose last copy is done, as a tensor like `part`, and the event to record after its next."""
        self._turn ^= 1
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        event.synchronize()
        size = part.numel() * part.element_size()
        if buffer.numel() < size:
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return buffer[:size].view(part.dtype).view(part.shape), event


_local = threading.local()


def staging_for(device: torch.device) -> Staging:
    """This thread's buffers for `device`."""
    by_device: dict[torch.device, Staging] = _local.__dict__.setdefault("by_device", {})
    if device not in by_device:
        by_device[device] = Staging(device)
    return by_device[device]


def release_staging() -> None:
    """Gives this thread's buffers back; the end of a load."""
    _local.__dict__.pop("by_device", None)
