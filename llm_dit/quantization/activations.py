"""The memory of activations, counted and not measured: a forward on the meta device takes milliseconds and no memory.

Every tensor that an operator makes is counted until the last reference to its memory is gone, which is when a GPU's allocator has
it again. What operators use inside is not seen: cuDNN's workspaces, and what a quantized Linear makes for one product, unless
a transient says it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .torchao_tensors.fused import operands

Transient = Callable[[Tensor, Tensor], int]
"""From the input and the weight of a Linear, the bytes that it holds only while it multiplies."""


def peak_activation_bytes(forward: Callable[[], Any]) -> int:
    """The largest number of bytes that `forward`, all of whose tensors are on meta, holds at once beyond what it was given."""
    return peaks_with_transients(forward, {"": None})[""]


def peaks_with_transients(forward: Callable[[], Any], transients: Mapping[str, Transient | None]) -> dict[str, int]:
    """The same for Linears with one transient or another, by its name, all of them counted in one forward."""
    live = _Live(transients)
    with torch.no_grad(), _Functions(live, transients), live:
        result = forward()
    del result
    return {name: max(peak, live.peak) for name, peak in live.peaks.items()}


class _Live(TorchDispatchMode):
    """Counts the storages that operators make while they live."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self.peaks = dict.fromkeys(names, 0)
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # "is nothing masked?", which transformers asks to leave out a mask: count it
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self._bytes += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return result

    def hold(self, name: str, size: int) -> None:
        """Counts bytes of one of the transients, which were there for a moment beside what lives now."""
        self.peaks[name] = max(self.peaks[name], self._bytes + size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size


class _Functions(TorchFunctionMode):
    """Attention as the fused kernels of a GPU compute it, which never hold the scores (meta's own implementation would), and
    the transients of Linears."""

    def __init__(self, live: _Live, transients: Mapping[str, Transient | None]) -> None:
        super().__init__()
        self._live = live
        self._transients = {name: transient for name, transient in transients.items() if transient is not None}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = given["query"], given["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        result = func(*args, **(kwargs or {}))
        if func is linear:
            activation, weight, _ = operands(args, kwargs)
            for name, transient in self._transients.items():
                self._live.hold(name, transient(activation, weight))
        return result
