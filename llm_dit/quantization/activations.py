"""The memory of activations, counted and not measured: a forward on the meta device takes milliseconds and no memory.

Every tensor that an operator makes is counted until the last reference to its memory is gone, which is when a GPU's allocator has
it again. What operators use inside (cuDNN's workspaces) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_activation_bytes(forward: Callable[[], Any]) -> int:
    """The largest number of bytes that `forward`, all of whose tensors are on meta, holds at once beyond what it was given."""
    live = _Live()
    with torch.no_grad(), _WithoutScores(), live:
        result = forward()
    del result
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the storages that operators make while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size


class _WithoutScores(TorchFunctionMode):
    """Attention as the fused kernels of a GPU compute it, which never hold the scores; meta's own implementation would."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, value = given["query"], given["value"]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))
