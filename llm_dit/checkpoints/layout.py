"""What a checkpoint file holds, read from its header: which weights are in fp8, their scales, and in whose conventions.

A file's name says nothing: one name of LTX-2.3 stands for two layouts. The maths are those of ComfyUI (QUANTIZATION.md,
comfy/ops.py) and of ltx-core: w = fp8 * weight_scale, x = fp8 * input_scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from .header import Header, TensorEntry

FP8_DTYPES: Final = ("F8_E4M3", "F8_E5M2")
WEIGHT_SCALES: Final = ("weight_scale", "scale_weight")
INPUT_SCALES: Final = ("input_scale", "scale_input")
MARKER: Final = "scaled_fp8"
FORMAT_TENSOR: Final = "comfy_quant"
METADATA_KEY: Final = "_quantization_metadata"
PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.")
"""What single files put before the names of a transformer; the first is Stability's, which ComfyUI and Lightricks kept."""
_BLOB_NAMES: Final = ("spiece_model", "tekken_model", "tokenizer_json")
"""Tokenizers, as bytes, that text encoder files of ComfyUI carry."""
_FORMATS: Final = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


@dataclass(frozen=True)
class Fp8Weight:
    """One tensor in fp8.

    Attributes:
        key: its name in the file.
        entry: its dtype, shape and place.
        scale: the name of its scale, or None for a raw cast.
        input_scale: the name of the scale of its activations, or None.
        full_precision: the file asks to dequantize it for the multiplication.
    """

    key: str
    entry: TensorEntry
    scale: str | None = None
    input_scale: str | None = None
    full_precision: bool = False


@dataclass(frozen=True)
class Layout:
    """What a file holds.

    Attributes:
        header: its header.
        title: how it is laid out, for people, e.g. "fp8, one scale per tensor, static input scales".
        prefix: what stands before the transformer's names, or "".
        fp8: the tensors in fp8, by their names in the file.
        dense: all other tensors that are weights.
        ignored: names of tensors that are none: markers, formats, tokenizers.
    """

    header: Header
    title: str
    prefix: str
    fp8: Mapping[str, Fp8Weight]
    dense: Mapping[str, TensorEntry]
    ignored: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> dict[str, TensorEntry]:
        """Every tensor that is a weight, in fp8 or not, by its name in the file."""
        return {**{key: weight.entry for key, weight in self.fp8.items()}, **self.dense}

    @property
    def static(self) -> bool:
        """True if the file has scales of activations."""
        return any(weight.input_scale for weight in self.fp8.values())

    def stays_fp8(self, key: str) -> bool:
        """True if the tensor can be held in fp8: an e4m3 matrix whose dimensions `torch._scaled_mm` takes."""
        weight = self.fp8.get(key)
        return (
            weight is not None
            and weight.entry.dtype == "F8_E4M3"
            and len(weight.entry.shape) == 2
            and key.endswith("weight")
            and all(size % 16 == 0 and size > 0 for size in weight.entry.shape)
        )


@dataclass
class _Companions:
    """Scales and formats by the name of their layer, as they are found."""

    weight_scales: dict[str, str] = field(default_factory=dict)
    input_scales: dict[str, str] = field(default_factory=dict)
    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def read_layout(header: Header) -> Layout:
    """The layout of a file.

    Raises:
        ValueError: for a layout that is not supported (mxfp8, nvfp4, int8 and others, by name), a scale without its weight,
            or an fp8 weight without its scale in a scaled file, by the file's own names.
    """
    companions = _companions(header)
    weights = {
        key: entry
        for key, entry in header.tensors.items()
        if key not in companions.ignored
        and key not in companions.weight_scales.values()
        and key not in companions.input_scales.values()
    }
    _refuse_unsupported(header, weights, companions)
    full_precision = _marker_asks_full_precision(header)
    fp8 = {}
    for key, entry in weights.items():
        if entry.dtype not in FP8_DTYPES:
            continue
        layer = key.removesuffix(".weight")
        fp8[key] = Fp8Weight(
            key,
            entry,
            companions.weight_scales.get(layer) if key.endswith(".weight") else None,
            companions.input_scales.get(layer) if key.endswith(".weight") else None,
            full_precision or bool(companions.formats.get(layer, {}).get("full_precision_matrix_mult")),
        )
    _check_scales(header, fp8, companions)
    dense = {key: entry for key, entry in weights.items() if key not in fp8}
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in weights)), "")
    return Layout(header, _title(header, fp8, companions), prefix, fp8, dense, tuple(companions.ignored))


def saved_classes(header: Header) -> dict[str, list[str]]:
    """The weights that torchao saved in several tensors each, by the class they have in memory; of other files none."""
    found: dict[str, list[str]] = {}
    for name, text in header.metadata.items():
        if "_tensor_data_names" in text:
            found.setdefault(str(_parsed(header, name, text).get("_type")), []).append(name)
    return found


def _companions(header: Header) -> _Companions:
    found = _Companions()
    for key in header.tensors:
        layer, _, name = key.rpartition(".")
        if name in WEIGHT_SCALES or name in INPUT_SCALES:
            scales = found.weight_scales if name in WEIGHT_SCALES else found.input_scales
            if layer in scales:
                raise ValueError(f"{header.path} holds both {scales[layer]!r} and {key!r}, two names of one scale")
            scales[layer] = key
        elif name == FORMAT_TENSOR:
            found.formats[layer] = _format(header, key)
            found.ignored.append(key)
        elif name in (MARKER, *_BLOB_NAMES) or (name.startswith("__") and name.endswith("__")):
            found.ignored.append(key)
    for layer, told in _metadata_layers(header).items():
        # Splitting a file, or putting it into another, changes what stands before its names, and not its metadata.
        bare = next((layer.removeprefix(prefix) for prefix in PREFIXES if layer.startswith(prefix)), layer)
        names = (layer, bare, *(prefix + bare for prefix in PREFIXES))
        found.formats.setdefault(next((name for name in names if f"{name}.weight" in header.tensors), layer), told)
    return found


def _format(header: Header, key: str) -> dict[str, Any]:
    if header.tensors[key].nbytes > 65536:
        raise ValueError(f"{header.path}: {key!r} is too large to be the format of a layer")
    return _parsed(header, key, header.read_bytes(key))


def _metadata_layers(header: Header) -> dict[str, dict[str, Any]]:
    text = header.metadata.get(METADATA_KEY)
    layers = _parsed(header, METADATA_KEY, text).get("layers", {}) if text is not None else {}
    if not isinstance(layers, dict) or not all(isinstance(told, dict) for told in layers.values()):
        raise ValueError(f"{header.path}: 'layers' of {METADATA_KEY} in its header is no mapping from layers to formats")
    return layers


def _parsed(header: Header, key: str, text: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{header.path}: {key!r} is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{header.path}: {key!r} is no JSON object")
    return parsed


def _refuse_unsupported(header: Header, weights: Mapping[str, TensorEntry], companions: _Companions) -> None:
    for layer, told in companions.formats.items():
        name = told.get("format")
        if not isinstance(name, str) or name not in _FORMATS:
            raise ValueError(_unsupported(header, layer, str(name)))
    for kind, names in saved_classes(header).items():
        raise ValueError(
            f"{header.path} is a component that save_pretrained wrote, with {len(names)} weights as torchao's {kind}: give "
            "load_pipeline the folder of its pipeline"
        )
    for key, entry in weights.items():
        if key.endswith((".weight_scale_2", ".weight_scale_inv")):
            name = "nvfp4" if key.endswith("_2") else "blockwise fp8 (128 x 128)"
            raise ValueError(_unsupported(header, key, name))
        scale = companions.weight_scales.get(key.removesuffix(".weight"))
        if scale is not None and header.tensors[scale].dtype in ("F8_E8M0", "U8"):
            raise ValueError(_unsupported(header, key, "mxfp8"))
        if entry.dtype == "I8":
            raise ValueError(_unsupported(header, key, "int8"))
        if entry.dtype in ("U8", "F4") and len(entry.shape) == 2 and key.endswith(".weight"):
            raise ValueError(_unsupported(header, key, "nvfp4" if scale else "4-bit"))
        if entry.dtype.startswith(("F8", "F6", "F4")) and entry.dtype not in FP8_DTYPES:
            raise ValueError(_unsupported(header, key, entry.dtype))


def _unsupported(header: Header, key: str, name: str) -> str:
    return (
        f"{header.path} holds {key!r} as {name}, which llm_dit does not read: take the fp8 or bf16 file of the same model "
        "(bf16 can be quantized while it loads)"
    )


def _marker_asks_full_precision(header: Header) -> bool:
    """Two elements in `scaled_fp8`: weights are to be dequantized to multiply (comfy/utils.py, convert_old_quants)."""
    return any(key.rpartition(".")[2] == MARKER and entry.elements == 2 for key, entry in header.tensors.items())


def _check_scales(header: Header, fp8: Mapping[str, Fp8Weight], companions: _Companions) -> None:
    path = header.path
    for layer, key in companions.weight_scales.items():
        weight = fp8.get(f"{layer}.weight")
        if weight is None:
            other = header.tensors.get(f"{layer}.weight")
            has = f"which is {other.dtype}, not fp8" if other else "which the file does not hold"
            raise ValueError(f"{path}: {key!r} is the scale of '{layer}.weight', {has}")
        shape, rows = header.tensors[key].shape, weight.entry.shape[:1]
        if header.tensors[key].dtype not in ("F32", "BF16", "F16", "F64"):
            raise ValueError(f"{path}: the scale {key!r} is {header.tensors[key].dtype}, and a scale is a float")
        if shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
            raise ValueError(
                f"{path}: the scale {key!r} is {list(shape)}, and '{layer}.weight' {list(weight.entry.shape)}: llm_dit reads one "
                "scale per tensor or per row"
            )
    for layer, key in companions.input_scales.items():
        if f"{layer}.weight" not in header.tensors:
            raise ValueError(f"{path}: {key!r} is the scale of the input of '{layer}', and the file holds no '{layer}.weight'")
        if header.tensors[key].elements != 1 or header.tensors[key].dtype not in ("F32", "BF16", "F16", "F64"):
            raise ValueError(
                f"{path}: the input scale {key!r} is {header.tensors[key].dtype} {list(header.tensors[key].shape)}, not one float"
            )
    for layer, told in companions.formats.items():
        weight = fp8.get(f"{layer}.weight")
        if weight is None or weight.entry.dtype != _FORMATS[told["format"]]:
            entry = header.tensors.get(f"{layer}.weight")
            raise ValueError(
                f"{path} says that '{layer}.weight' is {told['format']}, and it is {entry.dtype if entry else 'not in the file'}"
            )
    if not companions.weight_scales:
        return
    for key, weight in fp8.items():
        if weight.scale is None and key.endswith(".weight") and len(weight.entry.shape) == 2:
            raise ValueError(f"{path}: {key!r} is fp8 and has no scale, in a file whose other weights have one")


def _title(header: Header, fp8: Mapping[str, Fp8Weight], companions: _Companions) -> str:
    if not fp8:
        kinds = [dtype for dtype in header.dtypes() if dtype in ("BF16", "F16", "F32")]
        return f"{kinds[0].lower() if kinds else 'unknown'}, not quantized"
    scaled = [weight for weight in fp8.values() if weight.scale]
    if not scaled:
        everything = all(entry.dtype in FP8_DTYPES for entry in header.tensors.values())
        return f"fp8, cast without scales ({'every tensor' if everything else 'some tensors'})"
    per_row = any(header.tensors[weight.scale].elements > 1 for weight in scaled if weight.scale)
    words = ["fp8", "one scale per row" if per_row else "one scale per tensor"]
    if companions.input_scales:
        words.append("static input scales")
    if any(key.endswith("scale_weight") for key in companions.weight_scales.values()):
        words.append("legacy names (scale_weight)")
    if any(key.rpartition(".")[2] == FORMAT_TENSOR for key in header.tensors):
        words.append("comfy_quant formats")
    if METADATA_KEY in header.metadata:
        words.append("formats in the header")
    if any(weight.full_precision for weight in fp8.values()):
        words.append("to be multiplied in 16 bits")
    return ", ".join(words)
