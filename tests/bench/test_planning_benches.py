"""The benches behind the planner at tiny size: what they report, and how constants are fitted."""

import io
import json
from contextlib import redirect_stdout

import pytest
from typer.testing import CliRunner

from llm_dit.bench import budgets, calibrate
from llm_dit.bench.fit import Point, correction, counted, fit, split
from llm_dit.bench.worker import Message
from llm_dit.cli import app


def bench(*words, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, words)], catch_exceptions=code != 0)
    assert result.exit_code == code, result.output
    return result


def test_points_are_measured_and_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "in_fresh_process", lambda function, *args, timeout_s: function(*args))
    output = tmp_path / "rows.json"
    bench("calibrate", "--geometry", "flux2-klein", "--geometry", "ltx2.3", "-o", output)
    rows = json.loads(output.read_text())
    assert {row["component"] for row in rows} == {"text_encoder", "connectors", "transformer", "vae"}
    assert not any("error" in row for row in rows)
    assert all(row["weights_bytes"] > 0 for row in rows)
    assert all(row["allocated_bytes"] is None or row["allocated_bytes"] > 0 for row in rows)
    again = bench("calibrate", "--geometry", "flux2-klein", "-o", output)
    assert "transformer" in again.output
    assert json.loads(output.read_text()) == rows


def test_a_point_in_a_process_of_its_own():
    case = calibrate.Case("z-image", "vae", "decode", 64, 64)
    (row,) = calibrate.run([case], jobs=1, timeout_s=300)
    assert row["weights_bytes"] > 0
    assert (row["geometry"], row["phase"]) == ("z-image", "decode")


def test_points_are_what_they_say():
    cases = [case for name in calibrate.POINTS for case in calibrate.points(name)]
    assert len(set(cases)) == len(cases)
    assert 60 <= len(cases) <= 90
    assert calibrate.Case("ltx-2.3", "vae", "decode", 704, 1216, 121, tile=512) in cases
    assert calibrate.Case("klein-9b", "transformer", "denoise", references=1) in cases
    assert counted(calibrate.Case("klein-4b", "vae", "decode", 512, 512)) > 2**28


def test_a_correction_covers_what_it_was_fitted_to():
    case = calibrate.Case("klein-4b", "vae", "decode")
    found = [Point(case, "vae", "AutoencoderKLFlux2", size, int(1.1 * size) + 10**8) for size in (10**8, 10**9, 10**10)]
    one = correction(found)
    for point in found:
        assert point.measured <= one.apply(point.counted) <= point.measured + point.allowed()


def test_fit_and_test_points_are_apart():
    fitted, tested = split(list(range(10)))
    assert sorted([*fitted, *tested]) == list(range(10))
    assert len(tested) == 3


def test_a_file_without_a_gpus_points_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold the points of a GPU"):
        fit(tmp_path / "rows.json")


def in_this_process(module, specification, timeout_s):
    """What a process of its own would report."""
    with redirect_stdout(io.StringIO()) as printed:
        budgets.main(specification)
    kind, value = json.loads(printed.getvalue().rpartition("@llm-dit-bench ")[2])
    yield Message(kind, value)


def test_budgets_of_a_tiny_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "messages", in_this_process)
    output = tmp_path / "rows.json"
    bench("budgets", "--model", "z-image", "--vram", "20GB", "--folder", tmp_path / "space", "-o", output)
    rows = {row["way"]: row for row in json.loads(output.read_text())}
    assert set(rows) == set(budgets.WAYS)
    ours = rows["llm-dit auto"]
    assert ours["success"] == "yes"
    assert all(ours[f"{phase}_promised_gib"] > 0 for phase in budgets.PHASES)
    assert any("held" in note for note in ours["report"])
    assert not list((tmp_path / "space").iterdir())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="did you mean 'klein-4b'"):
        budgets.plan(["klein-4c"], None, budgets.Options(None))
    with pytest.raises(ValueError, match="did you mean"):
        calibrate.plan(["klein-4"])
