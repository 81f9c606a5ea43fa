"""Writing a transformer as scaled fp8 in the layouts that its authors and ComfyUI publish.

Every Linear of a repeated block goes to fp8 with one float32 scale, amax / 448; what stands outside the blocks, biases and norms
stay in bf16, as in the published files. No input scale is written: that would take calibration, and every reader of these layouts
quantizes activations dynamically without one. Tensors are read, quantized and written one at a time.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ..names import check_name
from ..quantization.hardware import current_device
from ..quantization.kernels.quantize_rows import FLOAT8_MAX
from ..quantization.torchao_tensors.staging import drain_staging, staged
from ..quantization.torchao_tensors.stream import fetch, row_chunks, store
from ..writing import check_place
from .header import ITEM_BYTES, Header, TensorEntry, read_header
from .layout import FORMAT_TENSOR, METADATA_KEY, PREFIXES
from .names import OfficialName
from .recognize import recognize

_FORMAT: Final = {"format": "float8_e4m3fn"}
_BLOCK = re.compile(rf"(?:{'|'.join(map(re.escape, PREFIXES))})?(\w*(?:blocks|layers|refiner))\.(\d+)\.")
"""Repeated blocks of the transformer itself, not those of LTX-2's connectors, which stand deeper."""


@dataclass(frozen=True)
class Style:
    """One layout that is written.

    Attributes:
        name: what `--layout` takes.
        families: whose transformers are published in it; empty for all.
        prefix: goes before every name.
        metadata: the header lists the layers' formats.
        format_tensors: a `comfy_quant` tensor beside every weight says its format.
    """

    name: str
    families: tuple[str, ...] = ()
    prefix: str = ""
    metadata: bool = False
    format_tensors: bool = False


STYLES: Final[Mapping[str, Style]] = {
    style.name: style
    for style in (
        Style("bfl", ("flux2",), metadata=True),
        Style("ltx", ("ltx2",), prefix=PREFIXES[0], metadata=True),
        Style("comfy", format_tensors=True),
    )
}


def layout_of(family: str) -> str:
    """The layout of a family's official fp8 files, or ComfyUI's."""
    return next((style.name for style in STYLES.values() if family in style.families), "comfy")


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path
    fp8_weights: int
    other_tensors: int
    nbytes: int


@dataclass
class _Tensor:
    """One tensor to write: the tensors of the source that make it, in order, and whether it goes to fp8."""

    sources: list[str] = field(default_factory=list)
    swapped: bool = False
    fp8: bool = False
    shape: tuple[int, ...] = ()
    dtype: str = "BF16"


def convert(source: str | Path, output: str | Path, layout: str = "comfy") -> Converted:
    """Writes the transformer of `source` as scaled fp8.

    Args:
        source: a pipeline folder, a transformer's folder, or a single .safetensors file, in bf16, fp16 or fp32. A file that
            holds more than the transformer keeps the rest as it is.
        output: the file to write; must not exist. It is written beside its place and moved there when it is whole.
        layout: "bfl", "ltx" or "comfy".

    Raises:
        ValueError: for a source that is no such transformer, or is quantized already, or a layout that is not its family's.
        FileExistsError: if there is such a file.
    """
    style = STYLES[check_name(layout, tuple(STYLES), "layout")]
    target = Path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"{str(target)!r} must end in .safetensors, which is what is written")
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists already: give a file that does not")
    check_place(target)
    headers = _headers(Path(source))
    owners = {name: header for header in headers for name in header.tensors}
    entries = {name: header.tensors[name] for name, header in owners.items()}
    family = _family(source, entries, style)
    tensors = _planned(entries, family, style)
    _verify(source, tensors, entries, family, style)
    beside = target.with_name(f".{target.name}.part")
    try:
        with beside.open("wb") as stream, ExitStack() as stack, staged():
            files = {header.path: stack.enter_context(safe_open(header.path, framework="pt", device="cpu")) for header in headers}
            _write(
                stream, tensors, lambda name: files[owners[name].path].get_tensor(name), _metadata(headers, tensors, style), style
            )
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    fp8 = sum(tensor.fp8 for tensor in tensors.values())
    return Converted(target, fp8, len(tensors) - fp8, target.stat().st_size)


def _headers(source: Path) -> list[Header]:
    """The files that hold the transformer's weights."""
    if source.is_file():
        return [read_header(source)]
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(source)!r} holds no safetensors file of a transformer: give a pipeline folder or a file")
    return [read_header(file) for file in files]


def _family(source: Any, entries: Mapping[str, TensorEntry], style: Style) -> Any:
    from ..families import get_family

    quantized = [name for name, entry in entries.items() if entry.dtype not in ("BF16", "F16", "F32")]
    if any(name.endswith(("weight", "qdata", "weight_scale")) for name in quantized):
        raise ValueError(
            f"{source} is quantized already ({quantized[0]!r} is {entries[quantized[0]].dtype}): give the bf16 model"
        )
    kind = recognize(entries)
    if kind is None or not kind.family:
        raise ValueError(f"{source} is no transformer of FLUX.2, LTX-2, Z-Image or Qwen-Image")
    if style.families and kind.family not in style.families:
        raise ValueError(
            f"layout {style.name!r} is for {', '.join(style.families)}, and {source} holds a {kind.title}: use 'comfy'"
        )
    return get_family(kind.family)


def _planned(entries: Mapping[str, TensorEntry], family: Any, style: Style) -> dict[str, _Tensor]:
    """Every tensor of the file to write, by its name there."""
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in entries)), "")
    parts: dict[str, list[tuple[int, str, bool]]] = {}
    inside = [name for name in entries if name.startswith(prefix)]
    # Beside other components the transformer keeps its prefix, which tells it from them.
    written = style.prefix or (prefix if len(inside) < len(entries) else "")
    diffusers_names = not prefix and _has_diffusers_names(inside, family)
    for name in inside:
        official = family.official_name(name) if diffusers_names else OfficialName(name.removeprefix(prefix))
        parts.setdefault(written + official.name, []).append((official.place, name, official.swapped))
    tensors = {}
    for name, found in parts.items():
        found.sort()
        first = entries[found[0][1]]
        rows = sum(entries[source].shape[0] for _, source, _ in found) if first.shape else 0
        shape = (rows, *first.shape[1:]) if first.shape else ()
        tensors[name] = _Tensor([source for _, source, _ in found], found[0][2], False, shape, _written_dtype(first.dtype))
    blocks = _block_counts(tensors)
    for name, tensor in tensors.items():
        tensor.fp8 = _goes_to_fp8(name, tensor.shape, blocks, family.bf16_blocks)
    others = {
        name: _Tensor([name], shape=entries[name].shape, dtype=entries[name].dtype) for name in entries if name not in inside
    }
    return {**tensors, **others}


def _written_dtype(dtype: str) -> str:
    """Floats are written in bf16, the rest as it is."""
    return "BF16" if dtype in ("F16", "F32") else dtype


def _has_diffusers_names(names: Sequence[str], family: Any) -> bool:
    """True if the family can translate every name, and translating changes some, so that they are not official already."""
    try:
        return any(family.official_name(name).name != name for name in names)
    except KeyError:
        return False


def _block_counts(names: Mapping[str, Any]) -> dict[str, int]:
    """How many blocks each list of blocks has, by the list's name."""
    counts: dict[str, int] = {}
    for name in names:
        block = _BLOCK.match(name)
        if block is not None:
            counts[block[1]] = max(counts.get(block[1], 0), int(block[2]) + 1)
    return counts


def _goes_to_fp8(name: str, shape: tuple[int, ...], blocks: Mapping[str, int], left: tuple[int, ...]) -> bool:
    block = _BLOCK.match(name)
    if block is None or len(shape) != 2 or not name.endswith(".weight") or any(size % 16 for size in shape):
        return False
    count = blocks[block[1]]
    # Of a model with so few blocks that none would be left, all go.
    kept = {index % count for index in left} if count > len(left) else set()
    return int(block[2]) not in kept


def _verify(source: Any, tensors: Mapping[str, _Tensor], entries: Mapping[str, TensorEntry], family: Any, style: Style) -> None:
    """Raises ValueError unless parts that are fused have one width, and nothing of the source is lost."""
    used = [name for tensor in tensors.values() for name in tensor.sources]
    if sorted(used) != sorted(entries):
        raise ValueError(f"{source}: some tensors have no place in the {style.name!r} layout of {family.title}")
    for name, tensor in tensors.items():
        if len({entries[part].shape[1:] for part in tensor.sources}) > 1:
            raise ValueError(f"{source}: {', '.join(tensor.sources)} cannot be one tensor {name!r}: their shapes differ")


def _metadata(headers: Sequence[Header], tensors: Mapping[str, _Tensor], style: Style) -> dict[str, str]:
    metadata = {key: value for header in headers for key, value in header.metadata.items() if len(headers) == 1}
    if style.metadata:
        layers = {name.removesuffix(".weight"): _FORMAT for name, tensor in tensors.items() if tensor.fp8}
        metadata[METADATA_KEY] = json.dumps({"format_version": "1.0", "layers": layers})
    return metadata


def _write(
    stream: IO[bytes], tensors: Mapping[str, _Tensor], read: Callable[[str], Tensor], metadata: Mapping[str, str], style: Style
) -> None:
    """The header, the tensors in its order, and the scales, which are known when the weights have been written."""
    told = json.dumps(_FORMAT).encode()
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, (dtype, shape, nbytes) in _entries(tensors, style, len(told)):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(struct.pack("<Q", len(encoded)) + encoded)
    scales = []
    for tensor in tqdm(tensors.values(), desc="Converting", delay=2, leave=False):
        value = _joined(tensor, read)
        if tensor.fp8:
            value, scale = quantize_scaled(value)
            scales.append(scale)
        elif tensor.dtype == "BF16" and value.is_floating_point():
            value = value.to(torch.bfloat16)
        stream.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    for scale in scales:
        stream.write(struct.pack("<f", scale) + (told if style.format_tensors else b""))


def _entries(tensors: Mapping[str, _Tensor], style: Style, told: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
    """(name, (dtype, shape, bytes)) of all that is written, in order."""
    for name, tensor in tensors.items():
        dtype = "F8_E4M3" if tensor.fp8 else tensor.dtype
        yield name, (dtype, tensor.shape, int(math.prod(tensor.shape) * ITEM_BYTES[dtype]))
    for name, tensor in tensors.items():
        if tensor.fp8:
            layer = name.removesuffix(".weight")
            yield f"{layer}.weight_scale", ("F32", (), 4)
            if style.format_tensors:
                yield f"{layer}.{FORMAT_TENSOR}", ("U8", (told,), told)


def _joined(tensor: _Tensor, read: Callable[[str], Tensor]) -> Tensor:
    parts = [read(name) for name in tensor.sources]
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.cat(value.chunk(2)[::-1]) if tensor.swapped else value


def quantize_scaled(weight: Tensor) -> tuple[Tensor, float]:
    """A weight [N, K] on the host as float8_e4m3fn with one scale, amax / 448; in chunks of rows, on the GPU where there is one.

    Raises:
        ValueError: if the weight holds NaN or infinity.
    """
    compute = current_device()
    largest = torch.stack([fetch(weight[chunk], compute).abs().amax() for chunk in row_chunks(weight, compute)]).amax().float()
    if not bool(torch.isfinite(largest)):
        raise ValueError("a weight holds NaN or infinity")
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * FLOAT8_MAX) / FLOAT8_MAX
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for chunk in row_chunks(weight, compute):
        part = (fetch(weight[chunk], compute).float() / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
        store(result[chunk], part.to(torch.float8_e4m3fn))
    drain_staging()
    return result, float(scale)
