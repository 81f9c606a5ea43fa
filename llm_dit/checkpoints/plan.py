"""What becomes of every tensor of a component that is read from a checkpoint file, decided and checked before any is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..quantization.filters import Layer, decide_layers, matches, named_layers
from ..quantization.methods import Method
from .encoders import prune
from .layout import Layout
from .names import Part, Piece, map_names

DTYPES: Final = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Dtypes of weights that are read."""


@dataclass(frozen=True)
class Wanted:
    """What a component is to become.

    Attributes:
        method: how its Linears are quantized; "none" reads everything in `dtype`.
        role: "encoder", "transformer" or "vae".
        granularity: of the fp8 methods.
        skip: name patterns that stay in `dtype`.
        dtype: dtype of what is not quantized, and of the computation.
        static: use the file's own scales of activations.
    """

    method: Method
    role: str
    granularity: str = "per-row"
    skip: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    static: bool = False


class PartsMissingError(ValueError):
    """The file holds a component without some of its top-level modules; what it does hold of it is whole."""


@dataclass
class Plan:
    """What becomes of every tensor of a component; checked, with nothing allocated yet.

    Attributes:
        layout: the file.
        wanted: what was asked for.
        pieces: by the name of a parameter or buffer, the rows of the file that make it.
        layers: every layer, with a configuration if its weight ends up quantized, else the reason.
        kept: names of the parameters that stay in the file's fp8.
        dequantized: names of the parameters that the file holds in fp8 and the model in 16 bits.
        scales: the values of all scales of the file that are used, by their names in it: float32, [rows or 1].
        notes: what a user should know.
    """

    layout: Layout
    wanted: Wanted
    pieces: Mapping[str, tuple[Piece, ...]]
    layers: list[Layer]
    kept: set[str] = field(default_factory=set)
    dequantized: list[str] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_component(model: nn.Module, layout: Layout, part: Part, wanted: Wanted) -> Plan:
    """Decides what becomes of every tensor and checks the file against the model.

    Args:
        model: the component on meta.
        part: where its tensors stand in the file. What the file leaves out and nothing reads is taken off `model`.

    Raises:
        ValueError: if a weight of the model is not filled or has another shape, a tensor of the file lands nowhere, or a scale
            is not finite and positive; by the file's own names.
    """
    pieces = map_names(model, layout, part)
    absent = _check_filled(model, layout, part, pieces)
    removed = prune(model, absent, part.unread) if absent else []
    expected = model.state_dict()
    pieces = {name: found for name, found in pieces.items() if name in expected}
    keeps_fp8 = wanted.method.fp8 and any(layout.stays_fp8(piece.key) for found in pieces.values() for piece in found)
    plan = Plan(layout, wanted, pieces, [])
    if removed:
        plan.notes.append(f"left out, because the file does not hold it and nothing reads it: {', '.join(removed)}")
    if keeps_fp8:
        plan.layers = _kept_layers(model, plan)
        plan.kept = {layer.parameter for layer in plan.layers if layer.config is not None}
    else:
        plan.layers = decide_layers(model, wanted.method, wanted.role, wanted.granularity, wanted.skip)
    for name, found in pieces.items():
        if name not in plan.kept and any(piece.key in layout.fp8 for piece in found):
            plan.dequantized.append(name)
    _read_scales(plan)
    _note(plan)
    return plan


def _check_filled(model: nn.Module, layout: Layout, part: Part, pieces: Mapping[str, tuple[Piece, ...]]) -> list[str]:
    """Names of the parameters that the file leaves out and nothing reads; raises where another is missing or does not fit."""
    path, kind = layout.header.path, type(model).__name__
    expected = model.state_dict()
    tied = _tied(model)
    absent, missing = part.unread.split(model, [name for name in expected if name not in pieces and name not in tied])
    extra = [name for name in pieces if name not in expected]
    whole = not extra and not set(map(_top, missing)) & set(map(_top, pieces))
    failure = PartsMissingError if whole else ValueError
    if missing and len(missing) > 0.5 * len(expected):
        raise failure(
            f"{path} is no checkpoint of this {kind}: it fills {len(expected) - len(missing)} of its {len(expected)} tensors "
            f"(missing: {listed(missing)}; not understood: {listed([pieces[name][0].key for name in extra if pieces[name]])})"
        )
    if missing:
        raise failure(f"{path} does not fill {listed(missing)} of the {kind}: is it of another size or version of the model?")
    if extra:
        keys = [pieces[name][0].key for name in extra if pieces[name]]
        raise ValueError(f"{path} holds {listed(keys)}, for which the {kind} has no place: is it of another size or version?")
    used = {piece.key for found in pieces.values() for piece in found}
    lost = [
        key
        for name, key in part.select(layout).items()
        if key in layout.fp8 and layout.fp8[key].scale and key not in used and not part.unread.covers(name)
    ]
    if lost:
        raise ValueError(f"{path}: the scaled fp8 weights {listed(lost)} land nowhere in the {kind}")
    for name, tensor in expected.items():
        if name in pieces:
            _check_shape(layout, kind, name, tensor, pieces[name])
    return absent


def _top(name: str) -> str:
    return name.partition(".")[0]


def _tied(model: Any) -> set[str]:
    """Names of parameters that are others of the model: a file holds those once."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return set()
    ties = getattr(config.get_text_config(), "tie_word_embeddings", None)
    if not (getattr(config, "tie_word_embeddings", False) if ties is None else ties):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def _check_shape(layout: Layout, kind: str, name: str, tensor: Tensor, found: tuple[Piece, ...]) -> None:
    for piece in found:
        entry = layout.weights[piece.key]
        if tensor.is_floating_point() and entry.dtype not in DTYPES:
            raise ValueError(f"{layout.header.path}: {piece.key!r} is {entry.dtype}, and a weight is a float")
        if tuple(entry.shape[1:]) != tuple(tensor.shape[1:]):
            raise ValueError(
                f"{layout.header.path}: {piece.key!r} is {list(entry.shape)}, and {name!r} of the {kind} {list(tensor.shape)}: "
                "it is of another size of the model"
            )
    rows = sum(piece.stop - piece.start for piece in found)
    if rows != (tensor.shape[0] if tensor.ndim else 1):
        keys = listed(sorted({piece.key for piece in found}))
        raise ValueError(f"{layout.header.path}: {keys} give {rows} rows, and {name!r} of the {kind} is {list(tensor.shape)}")


def _kept_layers(model: nn.Module, plan: Plan) -> list[Layer]:
    """Every layer; those stay in fp8 that the file holds so, whatever the component filters say of runtime quantization."""
    make_config = plan.wanted.method.make_config
    assert make_config is not None
    layers = []
    for name, module in named_layers(model, plan.wanted.role):
        reason = _reason(name, module, plan)
        layers.append(Layer(name, module, None if reason else make_config(plan.wanted.granularity), reason))
    return layers


def _reason(name: str, module: nn.Module, plan: Plan) -> str:
    """Why a layer does not stay in the file's fp8, or ""."""
    found = plan.pieces.get(f"{name}.weight", ())
    dtypes = {plan.layout.weights[piece.key].dtype for piece in found}
    if not dtypes & {"F8_E4M3", "F8_E5M2"}:
        return f"the file holds it in {', '.join(sorted(dtypes)) or 'no tensor of its own'}"
    for pattern in plan.wanted.skip:
        if matches(name, pattern):
            return f"skip pattern {pattern!r}"
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"dequantized: a {type(module).__name__} does not multiply fp8"
    if dtypes != {"F8_E4M3"}:
        return f"dequantized: the file holds it in {', '.join(sorted(dtypes))}"
    if module.in_features % 16 or module.out_features % 16:
        return f"dequantized: {module.in_features} x {module.out_features} is not divisible by 16, which fp8 needs"
    return ""


def _read_scales(plan: Plan) -> None:
    """Reads the scales that are used; they are small, and whether they are sound must be known before a weight is read."""
    layout = plan.layout
    used = {piece.key for found in plan.pieces.values() for piece in found if piece.key in layout.fp8}
    with opened(layout) as file:
        for key in sorted(used):
            weight = layout.fp8[key]
            if weight.scale is not None:
                scale = file.get_tensor(weight.scale).float().flatten()
                if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                    raise ValueError(f"{layout.header.path}: the scale {weight.scale!r} is not finite and positive everywhere")
                plan.scales[weight.scale] = scale
            if weight.input_scale is not None:
                value = file.get_tensor(weight.input_scale).float().flatten()
                # 1.0 is what converters write where they measured nothing (comfy/ops.py drops it too).
                if bool(torch.isfinite(value).all()) and 0 < float(value) != 1.0:
                    plan.scales[weight.input_scale] = value


def _note(plan: Plan) -> None:
    layout, wanted = plan.layout, plan.wanted
    plan.notes.append(f"read from {layout.header.path.name} (the file is: {layout.title})")
    quantizes = any(layer.config is not None for layer in plan.layers)
    if plan.dequantized and quantizes and not plan.kept:
        plan.notes.append(f"its fp8 was dequantized and quantized again to {wanted.method.name}, which adds the errors of both")
    if wanted.static:
        static = [name for name in plan.kept if input_scale(plan, name) is not None]
        if not static:
            raise ValueError(
                f"{layout.header.path} has no usable scales of activations, which activation_scale='static' asks for: "
                "leave it at 'dynamic'"
            )
        plan.notes.append(f"static input scales in {len(static)} of {len(plan.kept)} fp8 layers")
    if wanted.method.quantizes_activations and any(full_precision(plan, name) for name in plan.kept):
        plan.notes.append("the file asks to multiply some weights in 16 bits, and they are (full_precision_matrix_mult)")


def input_scale(plan: Plan, name: str) -> Tensor | None:
    """The scale of the activations of a layer: the largest where its weight comes from several, None if one has none."""
    keys = [plan.layout.fp8[piece.key].input_scale for piece in plan.pieces[name] if piece.key in plan.layout.fp8]
    scales = [plan.scales[key] for key in keys if key in plan.scales]
    return torch.cat(scales).amax() if scales and len(scales) == len(keys) else None


def full_precision(plan: Plan, name: str) -> bool:
    return any(plan.layout.fp8[piece.key].full_precision for piece in plan.pieces[name])


@contextmanager
def opened(layout: Layout) -> Iterator[Any]:
    with safe_open(layout.header.path, framework="pt", device="cpu") as file:
        yield file


def listed(names: Sequence[str]) -> str:
    """The first names, quoted, and how many more."""
    shown = ", ".join(repr(name) for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "nothing"
