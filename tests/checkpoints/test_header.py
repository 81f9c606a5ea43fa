"""Headers that are right, cut short, or lie."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from llm_dit.checkpoints.header import read_header


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {"a": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(5, dtype=torch.int8), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.tensors["a"].shape == (3, 4)
    assert header.tensors["a"].dtype == "BF16"
    assert header.nbytes == 24 + 5 + 4
    assert header.dtypes() == {"BF16": 24, "I8": 5, "F32": 4}
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", len(h := json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()))
        + h
        + b"\0",
    ],
)
def test_refuses_what_is_none(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"safetensors file|cut short"):
        read_header(file)
