"""With which arguments a pipeline is called where the user gives none."""

from pathlib import Path

import pytest
import torch

from llm_dit import load_pipeline
from llm_dit.generate import GenerateOptions, call_arguments, generate


@pytest.mark.parametrize(
    ("name", "distilled", "steps", "guidance"),
    [("flux2-dev", None, 50, 4.0), ("flux2-klein", False, 50, 4.0), ("flux2-klein", True, 4, 1.0)],
)
def test_steps_and_guidance_are_those_of_the_model(name, distilled, steps, guidance, tiny):
    pipe = load_pipeline(tiny(name), torch_dtype=torch.bfloat16)
    if distilled is not None:
        pipe.register_to_config(is_distilled=distilled)
    options = GenerateOptions(str(tiny(name)), "a cat", Path("out.png"))
    arguments = call_arguments(pipe, options)
    assert (arguments["num_inference_steps"], arguments["guidance_scale"]) == (steps, guidance)
    given = GenerateOptions(str(tiny(name)), "a cat", Path("out.png"), call={"num_inference_steps": 7}, guidance=1.5)
    arguments = call_arguments(pipe, given)
    assert (arguments["num_inference_steps"], arguments["guidance_scale"]) == (7, 1.5)


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("z-image", {"height": 100}, "Z-Image makes pictures whose height is a multiple of 16, not 100: 96 is the nearest"),
        ("z-image", {"width": 5}, "not 5: 16 is the nearest"),
        ("ltx2", {"num_frames": 16}, "makes clips of a multiple of 8 frames and one, not 16: 17 is the nearest"),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_before_anything_is_read(name, call, message, tiny, monkeypatch):
    monkeypatch.setattr("llm_dit.generate.load_pipeline", lambda *_, **__: pytest.fail("it was read"))
    ending = "mp4" if "num_frames" in call else "png"
    with pytest.raises(ValueError, match=message):
        generate(GenerateOptions(str(tiny(name)), "a cat", Path(f"out.{ending}"), call=call, device="cpu"))
