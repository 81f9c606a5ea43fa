import pytest
import torch
from torch._inductor.utils import run_and_get_code

from llm_dit.cheaper_arithmetic import CheaperArithmetic


def rotate(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(-2).type_as(states)


def rotate_other_way_round(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(table.unsqueeze(1) * pairs).flatten(-2).type_as(states)


@pytest.mark.parametrize("function", [rotate, rotate_other_way_round])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_rotations_compile_to_real_arithmetic(function, dtype):
    torch.compiler.reset()
    states = torch.randn(2, 7, 3, 8, dtype=dtype)
    table = torch.polar(torch.rand(7, 4) + 0.5, torch.randn(7, 4))
    compiled = torch.compile(function, options={"post_grad_custom_pre_pass": CheaperArithmetic()})
    with torch.no_grad():
        output, (code,) = run_and_get_code(compiled, states, table)
    torch.testing.assert_close(output, function(states, table))
    assert "view_as_complex" not in code
    assert "aten.mul" not in code


def test_other_complex_products_are_left_alone():
    torch.compiler.reset()
    table = torch.polar(torch.ones(7, 4), torch.randn(7, 4))
    compiled = torch.compile(
        lambda left, right: torch.view_as_real(left * right), options={"post_grad_custom_pre_pass": CheaperArithmetic()}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(table, table), torch.view_as_real(table * table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_compiles_without_tanh(dtype):
    torch.compiler.reset()
    values = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf")]))).to(dtype)
    compiled = torch.compile(
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"), options={"post_grad_custom_pre_pass": CheaperArithmetic()}
    )
    with torch.no_grad():
        output, (code,) = run_and_get_code(compiled, values)
    expected = torch.nn.functional.gelu(values.double(), approximate="tanh")
    # Below -5 PyTorch's own float32 loses all digits of 1 + tanh.
    torch.testing.assert_close(output, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert "tanh(" not in code


def test_tanh_itself_is_left_alone():
    torch.compiler.reset()
    values = torch.linspace(-1e-3, 1e-3, 101)
    compiled = torch.compile(torch.tanh, options={"post_grad_custom_pre_pass": CheaperArithmetic()})
    with torch.no_grad():
        torch.testing.assert_close(compiled(values), torch.tanh(values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_models_with_complex_rotary_embeddings_compile_without_them(name):
    from llm_dit.bench.geometry import GEOMETRIES
    from llm_dit.compiling import compile_component

    torch.compiler.reset()
    geometry = GEOMETRIES[f"tiny-{name}"]
    model = geometry.build(torch.device("cpu")).float()
    inputs = geometry.inputs(model, torch.device("cpu"))
    inputs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.float() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf, inputs
    )
    with torch.no_grad():
        expected = model(**inputs)[0]
        compile_component(model, "default")
        output, codes = run_and_get_code(lambda: model(**inputs)[0])
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    assert codes
    assert not any("view_as_complex" in code for code in codes)
