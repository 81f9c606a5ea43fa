"""With which arguments a pipeline is called where the user gives none."""

from pathlib import Path

import pytest
import torch

from llm_dit import load_pipeline
from llm_dit.generate import GenerateOptions, call_arguments


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
