"""The "cuda-graph" mode where there is no GPU: it stays out of the way. What it captures is tested in test_gpu.py."""

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from llm_dit import load_pipeline
from llm_dit.compiling import compile_component
from llm_dit.graphs import _fingerprint, _signature, graph_forward
from llm_dit.quantization import quantize_component


def test_on_the_cpu_and_with_gradients_the_model_runs_as_it_is():
    model = nn.Linear(4, 4)
    graphed = graph_forward(model)
    assert graph_forward(model) is graphed
    inputs = torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(model(inputs), nn.functional.linear(inputs, model.weight, model.bias))
    model(inputs).sum().backward()
    assert model.weight.grad is not None
    assert graphed.captured == 0


def test_a_copy_runs_its_own_weights():
    model = nn.Linear(4, 4)
    graph_forward(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.zero_()
        assert not torch.equal(copied(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_what_a_capture_bakes_in_changes_the_fingerprint():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = _fingerprint(model)
    with torch.no_grad():
        model[0].weight.mul_(2)  # in place: the graph reads the new values
    assert _fingerprint(model) == before
    model[0].weight.data = model[0].weight.data.clone()
    moved = _fingerprint(model)
    assert moved != before
    model[1] = nn.Linear(4, 4)
    assert _fingerprint(model) != moved


def test_another_arithmetic_of_int4_or_another_attention_changes_the_fingerprint():
    model, _ = quantize_component(nn.Sequential(nn.Linear(128, 32, dtype=torch.bfloat16)), "int4", "transformer")
    before = _fingerprint(model)
    model[0].weight.fp8_compute = True
    assert _fingerprint(model) != before
    model[0].weight.fp8_compute = False
    with attention_backend("_native_math"):
        assert _fingerprint(model) != before
    assert _fingerprint(model) == before


def test_signatures_tell_autocasts_apart():
    tensor = torch.ones(2, 3)
    found = {_signature([tensor], "spec")}
    torch.set_autocast_enabled("cuda", True)  # as `torch.autocast("cuda")` does where there is a GPU
    try:
        for dtype in (torch.bfloat16, torch.float16):
            torch.set_autocast_dtype("cuda", dtype)
            found.add(_signature([tensor], "spec"))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert len(found) == 3


def test_signatures_tell_shapes_and_values_apart():
    tensor = torch.ones(2, 3)
    signature = _signature([tensor, 1.0], "spec")
    assert signature == _signature([torch.zeros(2, 3), 1.0], "spec")
    assert signature != _signature([torch.ones(3, 3), 1.0], "spec")
    assert signature != _signature([tensor, 2.0], "spec")
    assert _signature([tensor, object()], "spec") is None


def test_without_cuda_the_mode_is_refused(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for mode in ("cuda-graph", "cuda-graph-eager"):
        with pytest.raises(ValueError, match=f"'{mode}' captures CUDA graphs, and there is no CUDA device: use 'default'"):
            compile_component(nn.Linear(4, 4), mode)
        with pytest.raises(ValueError, match=mode):
            load_pipeline(tiny("z-image"), compile=True, compile_mode=mode)
