"""Grids of int4: what each stores, and that the ones made for less error have less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_dit.bench import int4_grids
from llm_dit.bench.int4_grids import GRIDS, Grid
from llm_dit.bench.quality import scene_captions
from llm_dit.bench.sensitivity import Options, Sensitivity
from llm_dit.quantization.torchao_tensors import Int4GroupConfig
from llm_dit.quantization.torchao_tensors.stream import quantize_weight


def random(rows=32, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(grid, weight):
    return float((grid.apply(weight).double() - weight.double()).norm())


def test_fitted_is_what_the_method_does():
    weight = random()
    assert_close(Grid(128, "fitted").apply(weight), quantize_weight(weight, Int4GroupConfig()).dequantize(), rtol=0, atol=0.01)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_what_is_made_for_less_error_has_less(seed):
    weight = random(seed=seed)
    plain = error(Grid(128, "minmax"), weight)
    assert error(Grid(128, "searched"), weight) <= plain
    assert error(Grid(128, "fitted"), weight) < error(Grid(128, "searched"), weight)
    assert error(Grid(64, "minmax"), weight) < plain
    assert error(Grid(64, "minmax"), weight) < error(Grid(64, "symmetric"), weight)
    assert error(Grid(128, "fitted", rank=4), weight) < error(Grid(128, "fitted"), weight)


def test_a_group_of_equal_weights_stays_what_it_is():
    weight = torch.full((2, 128), 0.5)
    for grid in (Grid(128, "searched"), Grid(128, "fitted")):
        assert torch.equal(grid.apply(weight), weight)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [(Grid(128, "minmax"), 4.25), (Grid(64, "symmetric"), 4.25), (Grid(32, "minmax"), 5), (Grid(128, "fitted", rank=4), 4.75)],
)
def test_bits(grid, bits):
    assert grid.bits(256, 256) == bits


def test_of_a_pipeline(tiny):
    call = {"height": 128, "width": 128, "num_inference_steps": 1}
    trial = Sensitivity(Options(str(tiny("z-image")), "int4", scene_captions(2), call=call, batch=2))
    rows = list(int4_grids.compare(trial, GRIDS[:2]))
    assert [row["grid"] for row in rows] == ["fitted, groups of 128", "searched, groups of 128"]
    assert all(row["error"] > 0 and row["psnr"] > 0 for row in rows)
    again, _ = trial.generate()
    assert all(torch.equal(one, other) for one, other in zip(again, trial.reference[0], strict=True))
    assert int4_grids.table(rows).count("\n") == 3


def test_clips_are_refused_before_any_is_made(tiny):
    with pytest.raises(ValueError, match="makes clips, and grids are compared on pictures"):
        int4_grids.require_pictures(str(tiny("ltx2.3")))
