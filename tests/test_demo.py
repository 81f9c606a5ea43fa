"""`make demo` on the machine that it finds. The card itself is the only thing replaced: there is none where most tests run."""

from llm_dit.demo import run_demo
from llm_dit.quantization import hardware
from llm_dit.quantization.hardware import Hardware


def test_methods_that_the_card_lacks_are_left_out_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "detect_hardware", lambda: Hardware("RTX 3060", (8, 6), 12 * 1024**3))
    shown = run_demo(tmp_path, prompts=["a small red circle above a large blue square"])
    assert [row["method"] for row in shown.rows] == ["none", "int8", "int4"]
    assert [reason.split()[0] for reason in shown.left_out] == ["fp8-dynamic", "fp8-weight-only"]
    assert shown.sheet.is_file()
