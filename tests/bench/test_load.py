"""The load benchmark at a tiny size: what it measures, not how fast."""

import torch

from llm_dit.bench import load
from llm_dit.bench.load import HEADER, Case, Measurement, measure, row, run
from llm_dit.tiny import build


def test_measures_in_a_fresh_process(tmp_path):
    build("flux2-klein").save_pretrained(tmp_path / "model")
    cases = (Case("bf16", "none"), Case("diffusers", "int8"), Case("llm-dit", "int8"))
    bf16, stock, ours = run(tmp_path / "model", cases)
    assert bf16.held_bytes > stock.held_bytes
    assert ours.held_bytes < 0.7 * bf16.held_bytes
    assert all(result.seconds > 0 and result.host_peak_bytes > 0 for result in (bf16, stock, ours))
    if not torch.cuda.is_available():
        assert ours.device_peak_bytes == 0
    columns = HEADER.splitlines()[0].count("|")
    assert all(row(result).count("|") == columns for result in (bf16, stock, ours))


def test_a_failing_case_does_not_take_the_others_with_it(tmp_path):
    build("flux2-klein").save_pretrained(tmp_path / "model")
    failed, fine = run(tmp_path / "model", (Case("llm-dit", "int9"), Case("bf16", "none")))
    assert "did you mean 'int8'" in failed.error
    assert fine.held_bytes > 0
    assert "int9" in row(failed)


def test_a_repeat_that_failed_is_not_the_fastest(monkeypatch, tmp_path):
    case = Case("bf16", "none")
    runs = iter([Measurement(case, error="out of memory"), Measurement(case, seconds=3.0), Measurement(case, seconds=2.0)])
    monkeypatch.setattr(load, "_in_fresh_process", lambda *_: next(runs))
    assert [one.seconds for one in run(tmp_path, (case,), repeats=3)] == [2.0]


def test_counts_what_the_pipeline_holds(tmp_path):
    pipe = build("flux2-klein")
    pipe.save_pretrained(tmp_path)
    result = Measurement(Case("bf16", "none"), **measure(tmp_path, Case("bf16", "none")))
    weights = sum(p.nbytes for model in (pipe.transformer, pipe.text_encoder, pipe.vae) for p in model.parameters())
    assert weights <= result.held_bytes <= weights + 2**16
    assert result.case.label == "bf16"
    assert Case("llm-dit", "int8", "cuda").label == "llm-dit int8, device_map='cuda'"
