"""The benchmark of several GPUs, with two processes on the CPU: what it reports, not how fast."""

import json

import pytest
from typer.testing import CliRunner

from llm_dit.bench.parallel import COLUMNS, Options, plan
from llm_dit.cli import app


def test_two_processes_at_tiny_size(tmp_path):
    words = ["bench", "parallel", "--count", "3", "--steps", "1", "--folder", tmp_path / "work", "-o", tmp_path / "rows.json"]
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"] for row in rows] == ["split", "split", "prompts"]
    assert "error" not in rows[0] | rows[1] | rows[2]
    for row in rows[:2]:
        assert 0 < row["floor"] < 0.1
        assert row["relerr"] < 2 * row["floor"]
    assert sum(rows[2]["by_rank"]) == rows[2]["same_pictures"] == 3
    assert all(row["one"] > 0 and row["all"] > 0 and row["ratio"] > 0 for row in rows)
    assert result.output.count("\n| ") == len(rows)
    assert all(name in {**rows[0], **rows[2]} for name, _ in COLUMNS)


def test_one_gpu_is_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="--gpus 1 compares nothing"):
        plan("", "", "", 1, 0, 4, 2, Options(tmp_path))
