"""Bytes that tensors really hold: `element_size` of a quantized tensor reports the dtype it stands for, not its storage."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
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


def model_tensors(model: nn.Module, counted: Container[int] = ()) -> Iterator[Tensor]:
    """The parameters and buffers of `model`, tied ones once, without those whose `id` is in `counted`."""
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in counted:
            yield tensor


def model_bytes(model: nn.Module, counted: Container[int] = ()) -> int:
    """Bytes of the parameters and buffers of `model`, without those whose `id` is in `counted`."""
    return sum(map(tensor_bytes, model_tensors(model, counted)))


def dense_bytes(model: nn.Module, dtype: torch.dtype, counted: Container[int] = ()) -> int:
    """The same as if nothing were quantized: parameters that stand for floats in `dtype`, the rest as it is."""
    parameters = {id(parameter) for parameter in model.parameters() if parameter.is_floating_point()}
    return sum(
        tensor.numel() * dtype.itemsize if id(tensor) in parameters else tensor_bytes(tensor)
        for tensor in model_tensors(model, counted)
    )
