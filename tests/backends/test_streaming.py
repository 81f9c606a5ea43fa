"""The quantizers inside the two libraries' loaders."""

import copy
import gc
import json

import diffusers
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn
from torchao.quantization import Int8Tensor
from transformers import Qwen3Model

from llm_dit.backends.base import LoadPlan
from llm_dit.backends.streaming import QUANT_METHOD, DiffusersStreamingConfig, Planner, TransformersStreamingConfig
from llm_dit.load import load_pipeline

CONFIGS = (DiffusersStreamingConfig, TransformersStreamingConfig)


@pytest.mark.parametrize("kind", CONFIGS)
def test_copying_a_configuration_copies_no_weights(kind):
    """transformers copies configurations deeply, and a plan holds the modules of what was loaded before."""
    weights = nn.Linear(64, 64)

    def make(model):
        return LoadPlan((), {"weight": lambda value, device: weights.weight})

    config = kind(planner=Planner(make), bits=8)
    for copied in (copy.deepcopy(config), copy.copy(config), dict(config)["planner"]):
        planner = copied if isinstance(copied, Planner) else copied.planner
        assert planner is config.planner


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_is_json_and_comes_back(kind):
    config = kind(planner=Planner(lambda model: LoadPlan((), {})), bits=4, method="int4", component_type="encoder")
    data = json.loads(config.to_json_string())
    assert data == {"quant_method": QUANT_METHOD, "bits": 4, "method": "int4", "component_type": "encoder"}
    again = kind.from_dict(data)
    assert again.to_dict() == config.to_dict()
    assert again.planner is None


def test_a_load_leaves_no_second_copy_of_its_weights(tiny):
    gc.collect()
    before = sum(type(thing) is Int8Tensor for thing in gc.get_objects())
    pipe = load_pipeline(tiny("z-image"), quantization={"transformer": "int8", "encoder": "int8", "vae": "int8"})
    gc.collect()
    held = sum(
        type(p.data) is Int8Tensor for model in (pipe.transformer, pipe.text_encoder, pipe.vae) for p in model.parameters()
    )
    # Every parameter is one object; what `.data` gives out above is gone again.
    assert sum(type(thing) is Int8Tensor for thing in gc.get_objects()) - before == held


@pytest.mark.parametrize(
    ("cls", "subfolder", "kind"),
    [
        (ZImageTransformer2DModel, "transformer", DiffusersStreamingConfig),
        (Qwen3Model, "text_encoder", TransformersStreamingConfig),
    ],
)
def test_exact_names_decide(cls, subfolder, kind, tiny):
    """One parameter is planned; its siblings of the same ending stay."""
    chosen = []

    def make(model):
        name = next(
            name for name, _ in model.named_parameters() if name.endswith("to_q.weight") or name.endswith("q_proj.weight")
        )
        chosen.append(name)
        return LoadPlan((), {name: lambda value, device: torch.zeros_like(value, device=device)})

    model = cls.from_pretrained(
        tiny("z-image"), subfolder=subfolder, dtype=torch.bfloat16, quantization_config=kind(planner=Planner(make))
    )
    zero = [name for name, parameter in model.named_parameters() if not parameter.any()]
    assert zero == chosen


def test_without_a_planner_an_unquantized_model_is_refused(tiny):
    with pytest.raises(ValueError, match="load it through an llm_dit pipeline"):
        ZImageTransformer2DModel.from_pretrained(
            tiny("z-image"), subfolder="transformer", quantization_config=DiffusersStreamingConfig()
        )
    assert QUANT_METHOD in diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING
