"""The speed benchmark at tiny size on whatever there is: what it reports, not how fast."""

import json

import pytest
import torch
from typer.testing import CliRunner

from llm_dit.bench import end_to_end, speed
from llm_dit.bench.floor import Flops, Rates, count_flops, floor_ms
from llm_dit.bench.geometry import GEOMETRIES
from llm_dit.bench.results import SPEED_COLUMNS, Job, Selection, collect, line, read_rows
from llm_dit.bench.worker import DIED, Message, messages
from llm_dit.cli import app
from llm_dit.families import published_models
from llm_dit.quantization import model_bytes

NAMES = ("geometry", "implementation", "method", "mode", "device", "torch")
FIGURES = ("ms", "spread_ms", "ratio", "bf16_ms", "weights_gib", "peak_gib", "first_call_s", "relerr", "floor_ms")
RELATIVE_ERROR = {"none": 0.001, "fp8-dynamic": 0.15, "fp8-weight-only": 0.12, "int8": 0.05, "int4": 0.4}
# Stock int4 has no CPU kernel, so that its case fails there; on a GPU everything is measured.
QUICK = ("--no-fresh", "--mode", "eager", "--steps", "2", "--warmups", "1", "--geometry", "tiny-z-image")


def bench(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", "speed", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with results of ours and of stock torchao, and what was printed."""
    folder = tmp_path_factory.mktemp("speed")
    methods = [word for method in RELATIVE_ERROR for word in ("--method", method)]
    who = ("--implementation", "llm-dit", "--implementation", "torchao")
    files = ("-o", folder / "rows.json", "--table", folder / "table.md", "--plot", folder / "plot.png")
    return folder, bench(*QUICK, *methods, *who, *files)


def test_rows(measured):
    rows = read_rows(measured[0] / "rows.json")
    assert {row["implementation"] for row in rows} == {"llm-dit", "torchao"}
    assert all(set(row) == {*NAMES, *FIGURES} for row in rows if "error" not in row)
    assert [row["method"] for row in rows if row["implementation"] == "llm-dit"] == list(RELATIVE_ERROR)
    whole = next(row for row in rows if row["method"] == "none")
    assert whole["ratio"] == 1
    assert whole["relerr"] == 0
    for row in rows:
        if "error" in row:
            continue
        assert row["ratio"] == pytest.approx(row["bf16_ms"] / row["ms"])
        assert row["bf16_ms"] == whole["ms"]
        assert 0 <= row["relerr"] < RELATIVE_ERROR[row["method"]]
        assert (row["peak_gib"] is None) == (row["device"] == "CPU")
        assert min(row[name] for name in ("ms", "first_call_s", "floor_ms")) > 0
        if row["method"] != "none":
            assert row["weights_gib"] < whole["weights_gib"]


def test_a_failed_case_is_a_row_with_its_error(measured):
    if torch.cuda.is_available():
        pytest.skip("stock int4 fails only without a GPU")
    row = next(
        row for row in read_rows(measured[0] / "rows.json") if row["method"] == "int4" and row["implementation"] == "torchao"
    )
    assert set(row) == {*NAMES, "error"}
    assert "CUDA" in row["error"]
    assert "CUDA" in line(row, SPEED_COLUMNS)


def test_table_and_plot(measured):
    folder, printed = measured
    table = (folder / "table.md").read_text()
    rows = read_rows(folder / "rows.json")
    assert len(table.splitlines()) == len(rows) + 2
    assert {text.count("|") for text in table.splitlines()} == {len(SPEED_COLUMNS) + 1}
    assert all(text in printed for text in table.splitlines())
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_from_its_results_with_failed_and_new_cases_only(tmp_path):
    output = tmp_path / "rows.json"
    asked = []

    def measure(cases):
        asked.append([case.method for case in cases])
        for case in cases:
            row = speed.failed(case, "broke") if case.method == "int4" else {**speed.failed(case, ""), "ms": 1.0}
            yield {name: value for name, value in row.items() if name != "error" or value}

    def run(*methods, again=False):
        job = Job(tuple(speed.Case("tiny-klein", "llm-dit", method, "eager") for method in methods), measure, SPEED_COLUMNS)
        return [row["method"] for row in collect(job, output, again)]

    assert run("none", "int4") == ["none", "int4"]
    assert run("none", "int4", "int8") == ["none", "int4", "int8"]
    assert run("int8", again=True) == ["int8"]
    assert asked == [["none", "int4"], ["int4", "int8"], ["int8"]]
    rows = read_rows(output)
    assert sorted(row["method"] for row in rows) == ["int4", "int8", "none"]
    # Another card's results are other results, and stay.
    output.write_text(json.dumps([{**row, "device": "another"} for row in rows]))
    run("none")
    assert asked[-1] == ["none"]
    assert len(read_rows(output)) == 4


def test_a_case_that_takes_its_process_down_spares_the_others(monkeypatch):
    cases = tuple(speed.Case("tiny-klein", "llm-dit", method, "eager") for method in ("none", "int8", "int4"))
    scripts = iter((["row", "died"], ["row"]))

    def reports(module, specification, timeout_s):
        left = [case["method"] for case in specification["cases"]]
        for kind, method in zip(next(scripts), left, strict=False):
            yield Message(kind, {"method": method} if kind == "row" else "the process was ended by SIGKILL")

    monkeypatch.setattr(speed, "messages", reports)
    first, second, third = speed.run(cases, speed.Options(fresh=False))
    assert (first, third) == ({"method": "none"}, {"method": "int4"})
    assert (second["method"], second["error"]) == ("int8", "the process was ended by SIGKILL")


def test_a_process_that_can_measure_nothing_spares_the_next(monkeypatch):
    """Its geometry cannot be built: of three cases, each in a process of its own, each says so itself."""
    cases = [speed.Case("none-such", "llm-dit", method, "eager") for method in ("none", "int8", "int4")]
    rows = list(speed.run(cases, speed.Options(steps=1, warmups=0, fresh=True, timeout_s=120)))
    assert [row["method"] for row in rows] == ["none", "int8", "int4"]
    assert all("none-such" in row["error"] and "exit code" not in row["error"] for row in rows)


def test_a_process_that_does_not_report_is_given_up():
    (reported,) = messages("llm_dit.bench.speed", {}, timeout_s=0.01)
    assert reported.kind == DIED
    assert "given up" in reported.value


def test_a_process_that_dies_says_why():
    (reported,) = messages("llm_dit.no_such_module", {}, timeout_s=60)
    assert reported.kind == DIED
    assert "no_such_module" in reported.value


def test_refuses_what_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        speed.plan(Selection(methods=("int9",)))
    with pytest.raises(ValueError, match="no such case"):
        speed.plan(Selection(implementations=("torchao",), modes=("graph",)))
    with pytest.raises(ValueError, match="end to end"):
        end_to_end.plan(Selection(implementations=("torchao",)))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of results"):
        read_rows(tmp_path / "no.json")


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name.startswith("tiny-")])
def test_tiny_geometries_run_and_are_the_same_every_time(name):
    geometry, cpu = GEOMETRIES[name], torch.device("cpu")
    outputs = []
    for _ in range(2):
        model = geometry.build(cpu)
        with torch.no_grad():
            outputs.append(speed.flat(model(**geometry.inputs(model, cpu))))
    assert torch.equal(*outputs)
    assert 0.1 < outputs[0].std() < 10


@pytest.mark.parametrize(
    ("name", "linear", "attention"),
    [("klein-9b", 64.4, 11.1), ("qwen-image", 62.6, 15.7), ("z-image", 52.2, 10.3)],
)
def test_counts_the_operations_of_the_published_geometries(name, linear, attention):
    flops = count_flops(GEOMETRIES[name])
    assert flops.linear / 1e12 == pytest.approx(linear, abs=0.05)
    assert flops.attention / 1e12 == pytest.approx(attention, abs=0.05)


def test_published_geometries_have_the_published_sizes():
    for geometry in GEOMETRIES.values():
        if geometry.published:
            with torch.device("meta"):
                published = published_models()[geometry.published].components["transformer"]()
            parameters = sum(parameter.numel() for parameter in published.parameters())
            assert model_bytes(geometry.build(torch.device("meta"))) == pytest.approx(2 * parameters, rel=1e-3)


def test_floor_takes_the_rate_of_the_method():
    flops, rates = Flops(linear=100, attention=20), Rates(bf16=10, attention=5, fp8=20)
    assert floor_ms(flops, rates, fp8=False) == 14_000
    assert floor_ms(flops, rates, fp8=True) == 9_000
    assert floor_ms(flops, Rates(10, 5), fp8=True) == 14_000


def test_end_to_end(tmp_path):
    output = tmp_path / "rows.json"
    where = ("--end-to-end", "--folder", tmp_path / "pipelines", "--geometry", "tiny-z-image", "-o", output)
    bench(*where, "--method", "int8", "--saved", "quantized")
    assert sorted(path.name for path in (tmp_path / "pipelines").iterdir()) == ["tiny-z-image", "tiny-z-image-int8"]
    (row,) = read_rows(output)
    assert "error" not in row
    parts = [row[f"{name}_s"] for name in ("import", "load", "encode", "steps", "decode")]
    assert min(parts) > 0
    assert sum(parts) <= row["first_picture_s"]
    assert row["picture_s"] > 0
    assert row["steps"] == 2
