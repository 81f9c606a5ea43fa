"""The soak in little: it goes through its acts, and tells a leak from noise."""

import random

import pytest
import torch

from llm_dit.bench.soak import ALLOWED_MIB, CYCLE, Case, plan, soak, trend

pytest.importorskip("peft")


def test_a_soak_goes_through_its_acts():
    torch.compiler.reset()
    row = soak(Case("z-image", "int8", 2 * len(CYCLE)))
    assert [len(values) for values in row["samples_mib"].values()] == [2] * len(row["samples_mib"])
    assert row["host_mib"] > 100
    assert row["flat"] in ("yes", "no")  # two samples show no trend


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
