"""The benchmark of several GPUs, with two processes on the CPU: what it reports, not how fast."""

import shutil

import pytest
import torch

from llm_dit.bench.parallel import COLUMNS, Options, plan


def test_two_processes_at_tiny_size(tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("on a GPU its models are large")
    shutil.copytree(tiny("z-image"), tmp_path / "tiny-z-image")
    job = plan("", "", "", 0, 0, 3, 1, Options(tmp_path))
    assert [(case.what, case.mode) for case in job.cases] == [("split", "eager"), ("split", "compile"), ("prompts", "eager")]
    split, shared = job.measure([job.cases[0], job.cases[-1]])  # without the compiler, which takes longest
    assert "error" not in split | shared
    assert 0 < split["floor"] < 0.1
    assert split["relerr"] < 2 * split["floor"]
    assert sum(shared["by_rank"]) == shared["same_pictures"] == 3
    assert all(row["one"] > 0 and row["all"] > 0 and row["ratio"] > 0 for row in (split, shared))
    assert all(name in {**split, **shared} for name, _ in COLUMNS)


def test_one_gpu_is_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="--gpus 1 compares nothing"):
        plan("", "", "", 1, 0, 4, 2, Options(tmp_path))
