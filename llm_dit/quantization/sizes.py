"""Bytes that tensors really hold: `element_size` of a quantized tensor reports the dtype it stands for, not its storage."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors behind `tensor`: itself, or what a wrapper subclass (a quantized weight) holds."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_parts(getattr(tensor, name))


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of storage behind one tensor, scales included."""
    return sum(part.numel() * part.element_size() for part in plain_parts(tensor))


def model_bytes(model: nn.Module, without: nn.Module | None = None) -> int:
    """Bytes of the parameters and buffers of `model`; tied ones count once, and those that `without` has too not at all."""
    counted = {id(tensor) for tensor in _tensors(without)} if without is not None else set()
    return sum(tensor_bytes(tensor) for tensor in _tensors(model) if id(tensor) not in counted)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
