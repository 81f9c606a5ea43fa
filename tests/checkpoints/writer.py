"""Checkpoint files in the layouts that models are published in, and broken copies of them.

Independent of the library's loader, which the files are to test: whatever both had in common would not be tested.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

INPUT_SCALE = 0.015625
"""Of layers that `write` is told none of: activations of up to 7."""

_BLOCK = re.compile(r"(^|\.)(double_blocks|single_blocks|transformer_blocks|layers|noise_refiner|context_refiner|blocks)\.\d+\.")
_NO_LINEARS = ("embed_tokens.", "position_embedding.", "lm_head.")
# The blocks of Gemma's vision tower stay in bf16, those of Qwen2.5-VL's do not.
_UNTOUCHED_TOWER = "vision_model."
_SHAPES: Mapping[str, tuple[int, ...]] = {"scalar": (), "one": (1,), "row": (-1,), "column": (-1, 1)}


@dataclass(frozen=True)
class Layout:
    """How the tensors of a file are stored.

    Attributes:
        name: what tests call it.
        fp8: the weights that are: none; the Linears of the blocks; those but for the attention's; all Linears; or every
            tensor, biases and norms too.
        scale: the shape of a weight's scale: [], [1], [N] or [N, 1]; None where the values are cast as they are.
        legacy: names the scales scale_weight and scale_input instead of weight_scale and input_scale.
        input_scale: whether there are scales of the activations.
        comfy_quant: whether each layer has a tensor of JSON that tells its format.
        metadata: whether the header lists the layers' formats.
        marker: the elements of the tensor scaled_fp8, where there is one.
        biases: whether the biases of the fp8 weights are fp8 as well.
        prefix: goes before all names.
        rest: the type of all that is not fp8.
        multiple: a weight is fp8 if its dimensions are multiples of this; does not matter to "everything".
    """

    name: str
    fp8: Literal["nothing", "blocks", "block-mlps", "all-linears", "everything"] = "blocks"
    scale: Literal["scalar", "one", "row", "column"] | None = "scalar"
    legacy: bool = False
    input_scale: bool = False
    comfy_quant: bool = False
    metadata: bool = False
    marker: int | None = None
    biases: bool = False
    prefix: str = ""
    rest: torch.dtype = torch.bfloat16
    multiple: int = 16

    def covers(self, key: str, tensor: Tensor) -> bool:
        """Whether the tensor of that name is stored in fp8, leaving biases aside."""
        if self.fp8 in ("nothing", "everything"):
            return self.fp8 == "everything"
        linear = key.endswith(".weight") and tensor.ndim == 2 and not any(name in key for name in _NO_LINEARS)
        if not linear or any(size % self.multiple for size in tensor.shape):
            return False
        in_block = _BLOCK.search(key) is not None and not key.startswith(_UNTOUCHED_TOWER)
        return self.fp8 == "all-linears" or (in_block and (self.fp8 == "blocks" or "att" not in key))


_SCALED = Layout("scaled", input_scale=True, metadata=True)

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("bf16", fp8="nothing", scale=None),
        # FLUX.2 klein by BFL; LTX-2 and LTX-2.3 by Lightricks.
        _SCALED,
        replace(_SCALED, name="scaled-one", scale="one"),
        replace(_SCALED, name="prefixed", prefix="model.diffusion_model."),
        # FLUX.2 dev by Comfy-Org, in whose double blocks the attention stays in bf16; and its text encoder.
        replace(_SCALED, name="mixed", fp8="block-mlps"),
        replace(_SCALED, name="scaled-marker", marker=0),
        Layout("row", scale="row", metadata=True),
        # Qwen-Image by lightx2v.
        Layout("column", scale="column"),
        # FLUX.3 by BFL.
        Layout("fp8r", scale="row"),
        # Qwen-Image by Comfy-Org: first all cast, later with scales.
        Layout("raw", fp8="everything", scale=None),
        Layout("comfy_quant", comfy_quant=True),
        Layout("raw-linears", fp8="all-linears", scale=None),
        # LTX-2.3 distilled by Lightricks, as it was first uploaded.
        Layout("raw-biases", scale=None, biases=True),
        # Z-Image by Kijai.
        Layout("legacy", fp8="all-linears", scale="one", legacy=True, marker=2, rest=torch.float32),
        # Wan; Qwen2.5-VL by Comfy-Org.
        Layout("legacy-input", fp8="all-linears", legacy=True, input_scale=True, marker=0),
    )
}


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
    prefix: str | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Writes a safetensors file.

    Args:
        path: of the file.
        tensors: by their official names; what is not floating point is written as it is.
        layout: how to store them.
        metadata: goes into the header, besides what the layout puts there.
        prefix: goes before all names, in place of the layout's.
        input_scales: of the activations, by the name of the layer; for layouts that have them.

    Returns:
        The float32 values that the file stands for, by the names of `tensors`.
    """
    prefix = layout.prefix if prefix is None else prefix
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    layers: list[str] = []
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            stored[key] = tensor
        elif layout.covers(key, tensor) and layout.scale:
            layer = key.removesuffix(".weight")
            layers.append(layer)
            scale = (input_scales or {}).get(layer, INPUT_SCALE)
            stored[key], values[key], companions = _scaled(tensor, layout, scale)
            stored |= {f"{layer}.{name}": companion for name, companion in companions.items()}
        elif layout.covers(key, tensor) or _is_fp8_bias(key, tensors, layout):
            stored[key] = _cast(tensor)
            values[key] = stored[key].float()
        else:
            stored[key] = tensor.to(layout.rest)
            values[key] = stored[key].float()
    if layout.marker is not None:
        stored["scaled_fp8"] = torch.zeros(layout.marker).to(FP8)
    header = {**(metadata or {}), **(_formats([prefix + layer for layer in layers]) if layout.metadata else {})}
    # Cloned, for two names may share one storage, and a slice does not own its own.
    save_file({prefix + key: tensor.clone().contiguous() for key, tensor in stored.items()}, path, header or None)
    return values


def _cast(tensor: Tensor) -> Tensor:
    return tensor.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _scaled(weight: Tensor, layout: Layout, input_scale: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A weight in fp8, the values it stands for, and the tensors that go with it, by the ends of their names."""
    assert layout.scale
    magnitudes = weight.float().abs()
    per_row = layout.scale in ("row", "column")
    scale = (magnitudes.amax(1, keepdim=True) if per_row else magnitudes.amax()) / FP8_MAX
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    quantized = _cast(weight.float() / scale)
    companions = {"scale_weight" if layout.legacy else "weight_scale": scale.reshape(_SHAPES[layout.scale])}
    if layout.input_scale:
        companions["scale_input" if layout.legacy else "input_scale"] = torch.tensor(input_scale).reshape(
            () if per_row else _SHAPES[layout.scale]
        )
    if layout.comfy_quant:
        companions["comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return quantized, quantized.float() * scale, companions


def _is_fp8_bias(key: str, tensors: Mapping[str, Tensor], layout: Layout) -> bool:
    weight = f"{key.removesuffix('.bias')}.weight"
    return layout.biases and key.endswith(".bias") and weight in tensors and layout.covers(weight, tensors[weight])


def _formats(layers: list[str]) -> dict[str, str]:
    formats = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    return {"_quantization_metadata": json.dumps(formats)}


def truncated(path: Path, missing: int = 1) -> Path:
    """A copy without the last `missing` bytes."""
    return _beside(path, "truncated", path.read_bytes()[:-missing])


def with_header(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
    """A copy with another header, and the same data.

    Args:
        path: of a file that `write` wrote.
        change: changes the header in place, or returns one to take its place.
    """
    header, data = _parts(path)
    parsed = json.loads(header)
    changed = change(parsed)
    return _beside(path, "header", _assembled(json.dumps(parsed if changed is None else changed), data))


def with_duplicate_key(path: Path, key: str | None = None) -> Path:
    """A copy whose header has the entry of `key`, by default the first tensor's, twice."""
    header, data = _parts(path)
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    key = next(iter(entries)) if key is None else key
    twice = f"{header.rstrip()[:-1]},{json.dumps(key)}:{json.dumps(entries[key])}}}"
    return _beside(path, "duplicate", _assembled(twice, data))


def without(path: Path, key: str) -> Path:
    """A sound copy that lacks one tensor."""
    tensors, metadata = _contents(path)
    del tensors[key]
    return _saved_beside(path, "without", tensors, metadata)


def with_tensor(path: Path, key: str, tensor: Tensor) -> Path:
    """A sound copy with one tensor more, or another in its place."""
    tensors, metadata = _contents(path)
    return _saved_beside(path, "with", {**tensors, key: tensor.contiguous()}, metadata)


def _parts(path: Path) -> tuple[str, bytes]:
    """The JSON of a file's header, and the bytes that follow it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].decode(), content[8 + length :]


def _assembled(header: str, data: bytes) -> bytes:
    encoded = header.encode()
    # safetensors pads the header so that the data is aligned.
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _saved_beside(path: Path, word: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Path:
    target = _unused(path, word)
    save_file(dict(tensors), target, dict(metadata) if metadata else None)
    return target


def _beside(path: Path, word: str, content: bytes) -> Path:
    target = _unused(path, word)
    target.write_bytes(content)
    return target


def _unused(path: Path, word: str) -> Path:
    """The first free name beside `path`: a test may break one file in several ways."""
    index = 0
    while (target := path.with_stem(f"{path.stem}-{word}-{index}")).exists():
        index += 1
    return target
