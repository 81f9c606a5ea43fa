"""Layerwise casting: a saved folder says enough to load again as it was."""

import pytest
import torch
from conftest import generate
from torch import nn

from llm_dit import load_pipeline
from llm_dit.backends import BACKENDS, ComponentRequest
from llm_dit.backends.layerwise import _cast_read
from llm_dit.quantization import get_method


def test_a_number_is_cast_as_a_matrix_is():
    for value in (torch.tensor(3.0), torch.full((2, 2), 3.0), torch.tensor(1e4)):
        found = _cast_read(value, torch.device("cpu"))
        assert torch.equal(found.float(), value.clamp(max=448))
        assert found.dtype == torch.float8_e4m3fn


def test_no_layer_is_left_for_dimensions_that_a_cast_does_not_mind():
    model = nn.ModuleDict({"pos_embed": nn.Linear(10, 10), "other": nn.Linear(10, 64)})
    request = ComponentRequest("text_encoder", "encoder", get_method("fp8-weight-only"))
    stats = BACKENDS["layerwise"].quantize_in_place(model, request)
    assert stats["skip_reasons"] == {"pos_embed": "diffusers' layerwise casting leaves it"}
    assert model["other"].weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_keeps_what_was_left_alone_and_its_dtype(dtype, tiny, tmp_path):
    layerwise = {"quantization": "fp8-weight-only", "quantization_backend": "layerwise"}
    pipe = load_pipeline(tiny("z-image"), torch_dtype=dtype, quantization_skip=["layers.0"], **layerwise)
    assert pipe.transformer.layers[0].attention.to_q.weight.dtype == dtype
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.transformer.layers[0].attention.to_q.weight.dtype == dtype
    assert again.vae.dtype == dtype
    assert torch.equal(generate(again, "z-image"), generate(pipe, "z-image"))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(generate(load_pipeline(tmp_path / "again"), "z-image"), generate(pipe, "z-image"))
