"""Reading the header of a safetensors file: names, dtypes, shapes and metadata, without a tensor and without torch.

Everything that a header can lie about is checked here, before anything else looks at the file: `safetensors` itself takes a
header that names a tensor twice.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit (safetensors, `MAX_HEADER_SIZE`); a larger figure means that the file is no safetensors file."""

ITEM_BYTES: Final[Mapping[str, float]] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F4": 0.5,
    "F6_E2M3": 0.75,
    "F6_E3M2": 0.75,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Bytes of one element by dtype (safetensors, `Dtype`)."""

_MAGIC: Final = {
    b"GGUF": "is a GGUF file: load it with diffusers' from_single_file(..., quantization_config=GGUFQuantizationConfig(...)) and "
    "pass the component to from_pretrained",
    b"PK\x03\x04": "is a pickle of torch.save, which can run any code when it is read: ask for, or convert it to, safetensors",
    b"\x80\x02": "is a pickle, which can run any code when it is read: ask for, or convert it to, safetensors",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as safetensors writes it, its shape, and where its bytes start in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of one file."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def dtypes(self) -> dict[str, int]:
        """Bytes by dtype, the most first."""
        counts: Counter[str] = Counter()
        for entry in self.tensors.values():
            counts[entry.dtype] += entry.nbytes
        return dict(counts.most_common())

    def read_bytes(self, key: str) -> bytes:
        """The bytes of one tensor, for small ones."""
        entry = self.tensors[key]
        with self.path.open("rb") as stream:
            stream.seek(entry.start)
            return stream.read(entry.nbytes)


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another format (named, with what to do), is cut short, or its header contradicts
            itself or the file's size.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            for magic, what in _MAGIC.items():  # afterwards, for a header's length may begin with the same bytes
                if start.startswith(magic):
                    raise ValueError(f"{file} {what}")
            raise ValueError(f"{file} is not a safetensors file, or is cut short")
        text = stream.read(length)
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a safetensors file: its header is no JSON object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: __metadata__ in its header is no mapping of strings")
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in raw.items()}
    _check_layout(file, tensors, 8 + length, size)
    return Header(file, tensors, metadata)


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{file}: its header names {twice!r} twice")
    return dict(pairs)


def _entry(file: Path, name: str, entry: Any, data_start: int) -> TensorEntry:
    """One checked entry."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
        valid = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in numbers) and begin <= end
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{file}: its header says of {name!r} neither dtype, shape nor place in a valid way: {entry!r}")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{file}: {name!r} has the unknown dtype {dtype!r}")
    expected = math.ceil(math.prod(shape) * ITEM_BYTES[dtype])
    if end - begin != expected:
        raise ValueError(
            f"{file}: its header lies about {name!r}: {dtype} {list(shape)} takes {expected} bytes, and {end - begin} are given"
        )
    return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(file: Path, tensors: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Tensors lie one after the other, without a hole or an overlap, up to the file's last byte."""
    place = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != place:
            what = (
                "overlaps the tensor before it" if entry.start < place else f"leaves {entry.start - place} bytes unused before it"
            )
            raise ValueError(f"{file}: its header lies about {name!r}, which {what}")
        place += entry.nbytes
    if place != size:
        raise ValueError(f"{file} is cut short or padded: its header asks for {place} bytes, it has {size}")
