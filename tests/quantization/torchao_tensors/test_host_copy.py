"""Copies in parts give what torch's give, and are made once torch's were slow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_dit.quantization.torchao_tensors import host_copy
from llm_dit.quantization.torchao_tensors.host_copy import PART_BYTES, PATIENCE, HostCopier


@pytest.fixture(scope="module")
def copier():
    """One that copies in parts."""
    copier = HostCopier()
    copier._slow = PATIENCE
    yield copier
    copier.close()


@pytest.mark.parametrize(("slow", "in_parts"), [(float("inf"), True), (0.0, False)])
def test_parts_come_after_so_many_slow_copies(slow, in_parts, monkeypatch):
    monkeypatch.setattr(host_copy, "SLOW", slow)
    copier, parts = HostCopier(), []
    monkeypatch.setattr(copier, "_copy_in_parts", lambda destination, source: parts.append(source))
    source = torch.zeros(PART_BYTES, dtype=torch.uint8)
    for _ in range(PATIENCE + 2):
        copier.copy(torch.empty_like(source), source)
    assert len(parts) == (2 if in_parts else 0)


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn]),
    rows=st.integers(0, 3),
    columns=st.sampled_from([0, 1, 7, PART_BYTES - 1, PART_BYTES, PART_BYTES + 3]),
)
def test_any_size_arrives_whole_and_nothing_beside_it(copier, dtype, rows, columns):
    source = torch.randint(0, 100, (rows, columns), dtype=torch.uint8).to(dtype)
    around = torch.zeros(rows + 2, columns).to(dtype)
    copier.copy(around[1:-1], source)
    assert torch.equal(around[1:-1].view(torch.uint8), source.view(torch.uint8))
    assert not around[0].float().any()
    assert not around[-1].float().any()


@pytest.mark.parametrize(
    ("destination", "source"),
    [
        (torch.zeros(6, 4), torch.randn(4, 6).t()),
        (torch.zeros(4, 6).t(), torch.randn(6, 4)),
        (torch.zeros(6, 4), torch.randn(6, 4).bfloat16()),
    ],
)
def test_other_strides_and_dtypes(copier, destination, source):
    copier.copy(destination, source)
    assert torch.equal(destination, source.float())


def test_an_empty_copy_does_nothing(copier):
    copier.copy(torch.empty(0, 5), torch.empty(0, 5))
