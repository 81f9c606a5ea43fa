"""Reading the header of a safetensors file: names, dtypes, shapes and metadata, without a tensor and without torch."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (safetensors, `MAX_HEADER_SIZE`); a larger figure means that the file is no safetensors file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as safetensors writes it, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of one file."""

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


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file.

    Raises:
        ValueError: if the file is not one, is cut short, or its header contradicts its size.
    """
    file = Path(path)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file} is not a safetensors file, or is cut short")
        try:
            raw = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    metadata = raw.pop("__metadata__", {})
    tensors = {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in raw.items()
    }
    end = max((entry["data_offsets"][1] for entry in raw.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{file} is cut short or padded: its header asks for {8 + length + end} bytes, it has {size}")
    return Header(tensors, metadata)
