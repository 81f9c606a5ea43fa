"""What our own weight tensors share: they dequantize, then the ordinary operator runs in the dtype of the activation.

A subclass lists its tensors and attributes as torchao's `TorchAOBaseTensor` asks, which gives it moving, copying,
cloning, flattening for `torch.compile` and, registered with :func:`serializable`, safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchao.prototype.safetensors import safetensors_utils
from torchao.utils import TorchAOBaseTensor

aten = torch.ops.aten
T = TypeVar("T", bound="type[DequantizedWeight]")
P = TypeVar("P", bound=type[TorchAOBaseTensor])


class DequantizedWeight(TorchAOBaseTensor):
    """A weight that is dequantized for each use. Subclasses define `dequantize` and list their operators' positions."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype` (by default the one it was quantized from)."""
        raise NotImplementedError


def run_dequantized(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Tensor:
    """Calls `func(input, weight, ...)` with the weight dequantized to the dtype of the input."""
    operands = list(args)
    keywords = dict(kwargs or {})
    activation = operands[0] if operands else keywords["input"]
    if len(operands) > 1:
        operands[1] = operands[1].dequantize(activation.dtype)
    else:
        keywords["weight"] = keywords["weight"].dequantize(activation.dtype)
    return func(*operands, **keywords)


@cache
def _code_hash() -> str:
    """Of the files that say what a compiler traces."""
    folder = Path(__file__).parent
    files = (*sorted(folder.glob("*.py")), *sorted((folder.parent / "kernels").glob("*.py")))
    return blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


def _stable_hash(weight: TorchAOBaseTensor) -> str:
    names, attributes = weight.__tensor_flatten__()
    parts = [getattr(weight, name) for name in names]
    traits = [(part.shape, part.stride(), part.dtype, part.device, part.requires_grad) for part in parts]
    key = (type(weight).__qualname__, weight.shape, weight.dtype, weight.requires_grad, names, traits, attributes, _code_hash())
    return blake2b(repr(key).encode(), digest_size=16).hexdigest()


def serializable(cls: T) -> T:
    """Lets torchao's safetensors support and `torch.load(weights_only=True)` take `cls`.

    torchao keeps two module-level tables for this and names appending to them as the way (docstring of
    `TorchAOBaseTensor`, "Safetensors Support"); a registration function upstream would replace this one.
    """
    if cls.__name__ not in safetensors_utils.ALLOWED_CLASSES:
        safetensors_utils.ALLOWED_CLASSES[cls.__name__] = cls
        safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(cls.__name__)
    return complete(cls)


def complete(cls: P) -> P:
    """Gives `cls` what is asked of a tensor class beyond torchao's `TorchAOBaseTensor`.

    Page-locked copies, for diffusers' group offloading with a stream; `torch.load`; concatenation, for `fuse_qkv_projections`,
    dequantized, because diffusers copies it into a Linear of its own; sums, dequantized too, of which DoRA takes norms; and a
    key for the compiler's caches on disk. PyTorch's own key (2.13) holds the attributes of a tensor and neither its class nor
    that class's code, so that a weight of ours would be given what was compiled for torchao's, or by an older version.
    """
    torch.serialization.add_safe_globals([cls])
    cls._stable_hash_for_caching = _stable_hash  # type: ignore[attr-defined]

    @cls.implements(aten.is_pinned.default)
    def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
        names, _ = args[0].__tensor_flatten__()
        return all(getattr(args[0], name).is_pinned() for name in names)

    @cls.implements(aten.cat.default)
    def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        parts = [part.dequantize() if isinstance(part, TorchAOBaseTensor) else part for part in args[0]]
        return func(parts, *args[1:], **(kwargs or {}))

    @cls.implements(aten.add.Tensor)
    def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        parts = [part.dequantize() if isinstance(part, TorchAOBaseTensor) else part for part in args]
        return func(*parts, **(kwargs or {}))

    @cls.implements(aten._pin_memory.default)
    def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        return args[0]._apply_fn_to_data(lambda part: part.pin_memory())

    return cls
