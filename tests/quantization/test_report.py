"""The report, as a person and as a program read it."""

import json

import pytest

from llm_dit.names import format_bytes
from llm_dit.quantization import ComponentReport, QuantizationReport

REPORT = QuantizationReport(
    (
        ComponentReport(
            "transformer",
            "transformer",
            "ZImageTransformer2DModel",
            "fp8-dynamic",
            "torchao",
            "per-row",
            2,
            4,
            {"a": "too small", "b": "too small"},
            2**31,
            2**30,
            1.5,
        ),
        ComponentReport("vae", "vae", "AutoencoderKL", bytes_before=1000, bytes_after=1000, note="left alone"),
    ),
    "a card",
    ("a note",),
)


def test_prints_what_was_done_and_why_not():
    text = str(REPORT)
    assert "fp8-dynamic per-row  torchao  2/4     2.00 GiB  1.00 GiB" in text
    assert "transformer: 2 layers not quantized, too small: a, b" in text
    assert "vae: left alone" in text
    assert text.endswith("note: a note")


def test_is_json():
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["components"]["transformer"]["quantized_layers"] == 2
    assert data["components"]["transformer"]["skipped_layers"] == 2
    assert data["bytes_after"] == 2**30 + 1000


def test_is_indexed_by_component():
    assert REPORT["vae"].class_name == "AutoencoderKL"
    with pytest.raises(KeyError, match="it has transformer, vae"):
        REPORT["text_encoder"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**29, "1.50 GiB")])
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text
