"""The soak in little: it goes through its acts, and tells a leak from noise."""

import json
import random

import pytest
from typer.testing import CliRunner

from llm_dit.bench.soak import ALLOWED_MIB, CYCLE, plan, trend
from llm_dit.cli import app

pytest.importorskip("peft")


def test_a_soak_on_whatever_there_is(tmp_path):
    count = 8 * len(CYCLE)
    result = CliRunner().invoke(
        app, ["bench", "soak", "--generations", str(count), "-o", str(tmp_path / "rows.json")], catch_exceptions=False
    )
    assert result.exit_code == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert "error" not in row
    assert len(row["samples_mib"]["host"]) == 8
    assert row["flat"] == "yes"


def test_a_leak_is_seen_and_noise_is_not():
    noise = random.Random(0)
    level = [700 + noise.uniform(-3, 3) for _ in range(25)]
    assert abs(trend(level)) < ALLOWED_MIB["host"]
    assert trend([value + 1.5 * index for index, value in enumerate(level)]) > ALLOWED_MIB["host"]
    assert trend([0.0] * 12 + [50.0] * 13) == 0  # a single step is no trend
    assert trend([100 - 90 * 0.5**index for index in range(25)]) < 5  # nor what fills up at first


def test_too_few_generations_show_no_trend():
    with pytest.raises(ValueError, match="too few to see a trend in"):
        plan(["z-image"], ["int8"], 10, 60)
