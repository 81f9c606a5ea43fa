"""The report names a faster choice exactly where a method is slower than bf16."""

import pytest

from llm_dit.quantization import METHODS
from llm_dit.quantization.hardware import Hardware
from llm_dit.quantization.speed_note import speed_note

H200 = Hardware("NVIDIA H200", (9, 0), 141 * 10**9)
A100 = Hardware("NVIDIA A100", (8, 0), 80 * 10**9)
CPU = Hardware("CPU", None, 0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_said_where_nothing_is_slower(method):
    assert speed_note(METHODS[method], None, "torchao", CPU) == ""
    if method in ("none", "fp8-dynamic"):
        assert speed_note(METHODS[method], "per-row", "torchao", H200) == ""


@pytest.mark.parametrize(
    ("method", "granularity", "backend", "hardware", "faster"),
    [
        ("fp8-weight-only", "per-row", "torchao", H200, "'fp8-dynamic' is the faster choice"),
        ("int8", None, "torchao", H200, "'fp8-dynamic' is the faster choice"),
        ("int4", None, "torchao", H200, "set_int4_compute(transformer, 'fp8')"),
        ("int8", None, "torchao", A100, "'none' is the faster choice where bf16 fits"),
        ("fp8-dynamic", "per-tensor", "torchao", H200, "granularity 'per-row' is faster"),
        ("fp8-weight-only", None, "layerwise", H200, "'fp8-weight-only' with backend 'torchao'"),
    ],
)
def test_the_faster_choice_is_named(method, granularity, backend, hardware, faster):
    assert faster in speed_note(METHODS[method], granularity, backend, hardware)
