"""Chunks of weights to a GPU and back through page-locked memory.

A checkpoint is mapped, not read: a copy of such memory to a GPU goes through the driver's own staging on one thread. Buffers
of ours are filled by several, and one is on its way while another is filled. On the way back a worker thread has them copied
out, because the host memory that is written is new and costs a page fault every 4 KiB.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .host_copy import HostCopier

BUFFERS: Final = 4
"""One on its way to the GPU, one being filled, two coming back."""
WHOLE_BYTES: Final = 1024**2
"""Tensors smaller than this are moved without staging, for which they are too short."""
CHUNK_BYTES: Final = 32 * 1024**2
"""How much of a larger one goes through a buffer at a time."""


class _Buffer:
    """Page-locked memory, and what must be done before it is used again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.event = torch.cuda.Event()
        self.copied_out: Future[None] | None = None

    def like(self, part: Tensor) -> Tensor:
        """The memory as a tensor of the dtype and shape of `part`, once its last use is over."""
        self.settle()
        size = part.numel() * part.element_size()
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._memory[:size].view(part.dtype).view(part.shape)

    def settle(self) -> None:
        """Waits for the last use; raises what went wrong in it."""
        if self.copied_out is not None:
            self.copied_out.result()
            self.copied_out = None
        self.event.synchronize()


class Staging:
    """Buffers for one GPU, made at their first use and grown when a larger chunk comes; one per thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [_Buffer() for _ in range(BUFFERS)]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llm_dit-staging")
        self._copier = HostCopier()
        self._turn = 0

    def upload(self, part: Tensor) -> Tensor:
        """`part`, which is on the CPU, as a tensor on the device."""
        buffer = self._next()
        staged = buffer.like(part)
        self._copier.copy(staged, part)
        on_device = staged.to(self.device, non_blocking=True)
        buffer.event.record(torch.cuda.current_stream(self.device))
        return on_device

    def download(self, part: Tensor, destination: Tensor) -> None:
        """Copies `part`, which is on the device, into `destination` on the CPU; done once `drain` returns."""
        buffer = self._next()
        staged = buffer.like(part)
        staged.copy_(part, non_blocking=True)
        buffer.event.record(torch.cuda.current_stream(self.device))

        def copy_out() -> None:
            buffer.event.synchronize()
            self._copier.copy(destination, staged)

        buffer.copied_out = self._worker.submit(copy_out)

    def drain(self) -> None:
        """Waits until every download has arrived."""
        for buffer in self._buffers:
            buffer.settle()

    def close(self) -> None:
        self.drain()
        self._worker.shutdown()
        self._copier.close()

    def _next(self) -> _Buffer:
        self._turn = (self._turn + 1) % BUFFERS
        return self._buffers[self._turn]


_local = threading.local()


def staging_for(device: torch.device) -> Staging:
    """This thread's buffers for `device`."""
    by_device: dict[torch.device, Staging] = _local.__dict__.setdefault("by_device", {})
    if device not in by_device:
        by_device[device] = Staging(device)
    return by_device[device]


def drain_staging() -> None:
    """Waits until all that this thread sent to the host has arrived."""
    for staging in _local.__dict__.get("by_device", {}).values():
        staging.drain()


@contextmanager
def staged() -> Iterator[None]:
    """Gives this thread's buffers back at the end of what moves many weights."""
    try:
        yield
    finally:
        for staging in _local.__dict__.pop("by_device", {}).values():
            staging.close()


def move_to_gpu(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, a GPU; what is large and on the host goes through the buffers, of a quantized weight each part."""
    if is_traceable_wrapper_subclass(tensor) and hasattr(tensor, "_apply_fn_to_data"):
        return tensor._apply_fn_to_data(lambda part: move_to_gpu(part, device))
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or nbytes < WHOLE_BYTES or tensor.is_pinned() or not tensor.is_contiguous():
        return tensor.to(device)
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    staging = staging_for(device)
    step = CHUNK_BYTES // tensor.element_size()
    for source, target in zip(tensor.view(-1).split(step), moved.view(-1).split(step), strict=True):
        target.copy_(staging.upload(source))
    return moved


def move_model_to_gpu(model: nn.Module, device: torch.device) -> None:
    """Moves the parameters and buffers of `model` as `nn.Module.to` does, through the buffers.

    A model with hooks is left for its own `to`: what offloads or casts it decides where its weights go.
    """
    hooked = any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in model.modules())
    if not hooked:
        with torch.inference_mode(False), torch.no_grad():
            model._apply(lambda tensor: move_to_gpu(tensor, device))
