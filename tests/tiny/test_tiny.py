"""Tiny pipelines: finite, the same at every call, and the same again from disk."""

import pytest
import torch
from conftest import generate
from diffusers import DiffusionPipeline

from llm_dit.tiny import build, get, tiny_pipelines


@pytest.mark.parametrize("name", tiny_pipelines())
def test_builds_saves_loads_and_generates(name, tiny, reference):
    output = reference(name)
    assert torch.isfinite(output).all()
    assert output.std() > 0.01
    assert torch.equal(generate(build(name), name), output)
    assert sum(file.stat().st_size for file in tiny(name).rglob("*")) < 12.5e6


@pytest.mark.parametrize("name", ["z-image", "flux2-klein", "qwen-image", "ltx2"])
def test_the_models_hear_their_inputs(name, tiny, reference):
    """A pipeline whose picture does not depend on a component could not show that quantizing broke it."""
    pipe = DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
    for component in ("text_encoder", "transformer", "vae"):
        model = getattr(pipe, component)
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        changed = generate(pipe, name)
        model.load_state_dict(saved)
        assert (changed - reference(name)).norm() / reference(name).norm() > 0.01, component


def test_leaves_the_random_state_and_dtype_alone():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    build("z-image")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is dtype


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'z-image'"):
        get("z-imag")
