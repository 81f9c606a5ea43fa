"""Recommendations by card. The card itself is the only thing replaced: there is none where most tests run."""

import pytest
import torch

from llm_dit.names import COMPILE_MODES, VALID_METHODS
from llm_dit.quantization import check_fp8_support, get_method, get_quant_compile_warnings, get_recommended_method, hardware
from llm_dit.quantization.hardware import Hardware, lack_of_support, require_support


def card(monkeypatch, capability, name="a card"):
    monkeypatch.setattr(hardware, "detect_hardware", lambda: Hardware(name, capability, 24 * 1024**3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without CUDA")
def test_without_cuda():
    assert not check_fp8_support()
    assert get_recommended_method() == "int8"
    for method in VALID_METHODS:
        require_support(get_method(method))


@pytest.mark.parametrize(
    ("capability", "fp8", "method"),
    [
        ((7, 5), False, "int8"),
        ((8, 6), False, "int8"),
        ((8, 9), True, "fp8-dynamic"),
        ((9, 0), True, "fp8-dynamic"),
        ((12, 0), True, "fp8-dynamic"),
    ],
)
def test_by_capability(monkeypatch, capability, fp8, method):
    card(monkeypatch, capability)
    assert check_fp8_support() is fp8
    assert get_recommended_method() == method


@pytest.mark.parametrize("method", ["fp8-dynamic", "fp8-weight-only"])
def test_fp8_on_an_older_card_names_the_method_to_use(monkeypatch, method):
    card(monkeypatch, (8, 6), "RTX 3060")
    with pytest.raises(ValueError, match=r"8\.9 or newer, and RTX 3060 has 8\.6: use 'int8'"):
        require_support(get_method(method))
    require_support(get_method("int8"))
    require_support(get_method("int4"))


def test_fp8_dynamic_per_row_wants_bfloat16_on_a_card(monkeypatch):
    card(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match=r"torch_dtype=torch\.bfloat16"):
        require_support(get_method("fp8-dynamic"), "per-row", torch.float16)
    require_support(get_method("fp8-dynamic"), "per-tensor", torch.float16)
    require_support(get_method("fp8-weight-only"), "per-row", torch.float16)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", COMPILE_MODES)
@pytest.mark.parametrize("method", VALID_METHODS)
def test_compile_warnings(method, mode, offload):
    warnings = get_quant_compile_warnings(method, mode, offload)
    reduce = mode == "reduce-overhead"
    assert len(warnings) == (reduce and method == "fp8-dynamic") + (reduce and offload)
    if reduce and method == "fp8-dynamic":
        assert warnings[0].startswith("fp8-dynamic uses autotune, which is incompatible with reduce-overhead")


def test_compile_warnings_refuse_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'default'"):
        get_quant_compile_warnings("int8", "defualt")
    with pytest.raises(ValueError, match="removed: use 'int4'"):
        get_quant_compile_warnings("4bit", "default")


def test_why_a_method_does_not_run_is_told_without_an_error(monkeypatch):
    card(monkeypatch, (8, 6), "RTX 3060")
    lacking = {name: lack_of_support(get_method(name)) for name in VALID_METHODS}
    assert {name for name, reason in lacking.items() if reason} == {"fp8-dynamic", "fp8-weight-only"}
    assert lacking["fp8-dynamic"].endswith("RTX 3060 has 8.6: use 'int8' instead")
