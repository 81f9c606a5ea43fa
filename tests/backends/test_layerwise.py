"""Layerwise casting: a saved folder says enough to load again as it was."""

import pytest
import torch
from conftest import generate

from llm_dit import load_pipeline


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
