"""Whatever is given to the planner, the configuration and the command line: a result, or one line and exit code 2."""

from dataclasses import replace

import click
import typer
from conftest import typed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_dit import cli
from llm_dit.config import RuntimeConfig
from llm_dit.forwards import Size
from llm_dit.planning.card import CARDS, get_card, parse_bytes
from llm_dit.planning.plan import checked_size, default_size, make_plan
from llm_dit.planning.sizes import pipeline_sizes

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "-1", "0", "1e9", "24GB", "nan", "../..", "a/b", "int8", "auto", "klein-9b", "[bold]", "\x00", "é" * 300]
    ),
)


def told(error: Exception) -> str:
    message = str(error)
    assert message
    assert "\n" not in message.strip()
    return message


@QUICK
@given(text=st.one_of(TEXT, st.integers(), st.floats(), st.none()))
def test_budgets(text):
    try:
        assert parse_bytes(text) > 0
    except ValueError as error:
        told(error)


@QUICK
@given(text=TEXT)
def test_cards(text):
    try:
        assert get_card(text).name in CARDS
    except ValueError as error:
        told(error)


@QUICK
@given(
    name=st.sampled_from(["z-image", "flux2-klein", "ltx2"]),
    change=st.fixed_dictionaries(
        {},
        optional={
            "height": st.one_of(st.integers(-10, 5000), st.sampled_from([64, 128, 512, 1024])),
            "width": st.one_of(st.integers(-10, 5000), st.sampled_from([64, 128, 512, 1024])),
            "frames": st.one_of(st.integers(-10, 500), st.sampled_from([1, 9, 121])),
            "batch": st.integers(-2, 300),
            "references": st.integers(-2, 20),
        },
    ),
)
def test_sizes(name, change, tiny):
    sizes = pipeline_sizes(str(tiny(name)), "read")
    try:
        size = checked_size(sizes, replace(default_size(sizes), **change))
    except ValueError as error:
        told(error)
    else:
        assert size.batch > 0


@settings(QUICK, max_examples=15)
@given(
    budget=st.integers(-1, 10**12),
    card=st.sampled_from(list(CARDS)),
    batch=st.integers(1, 3),
    side=st.sampled_from([64, 256, 1024]),
)
def test_plans(budget, card, batch, side, tiny):
    try:
        plan = make_plan(str(tiny("z-image")), budget, get_card(card), Size(side, side, batch=batch))
    except ValueError as error:
        told(error)
        return
    assert plan.fits == (plan.shown.peak.device <= budget)
    assert bool(plan.short_by) != plan.fits
    assert plan.to_dict()["fits"] == plan.fits


SECTIONS = st.sampled_from(["quantization", "flux2", "ltx2", "z_image", "qwen_image", "sana", ""])
KEYS = st.sampled_from(
    ["encoder", "transformer", "skip", "quantization_skip", "quantization_backend", "compile", "compile_mode", "x"]
)
VALUES = st.sampled_from(
    ['"int8"', '"nan"', "1", "true", "[]", '["a", 1]', "{a = 1}", '{transformer = "torchao"}', "nan", "1979-05-27"]
)


@QUICK
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(st.tuples(SECTIONS, KEYS, VALUES), max_size=4).map(
            lambda rows: "\n".join(f"[{section}]\n{key} = {value}" for section, key, value in rows)
        ),
    )
)
def test_configurations(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        config = RuntimeConfig.from_toml(path)
    except ValueError as error:
        told(error)
    else:
        assert config.get_pipeline_quant_config("flux2").transformer


def commands():
    """Every command with its parameters, by what is typed."""
    root = typer.main.get_command(cli.app)
    found = {}
    for name, command in root.commands.items():
        nested = getattr(command, "commands", None)
        found |= {(name, inner): one.params for inner, one in nested.items()} if nested else {(name,): command.params}
    return found


COMMANDS = commands()


@st.composite
def arguments(draw):
    """A command with strings for its arguments and some of its options; never so that it would work."""
    words = draw(st.sampled_from(sorted(COMMANDS)))
    line = list(words)
    for parameter in COMMANDS[words]:
        if parameter.param_type_name == "argument":
            line.append(draw(TEXT))
        elif parameter.name != "help" and draw(st.booleans()):
            line.append(draw(st.sampled_from(parameter.opts)))
            if not parameter.is_flag:
                line.append(draw(TEXT))
    return [*line, *draw(st.sampled_from([[], ["--bogus"], ["more"]]))]


# What these do with nothing given is their work, which takes minutes and writes files.
WORKING = {
    words
    for words, parameters in COMMANDS.items()
    if words[0] in ("bench", "demo") and not any(parameter.required for parameter in parameters)
}


@settings(QUICK, max_examples=150)
@given(line=arguments())
def test_command_lines(line, tmp_path_factory):
    if WORKING & {tuple(line[:1]), tuple(line[:2])}:
        line = [*line, "--bogus"]
    code, _, error = typed(*line, cwd=tmp_path_factory.mktemp("cli"))
    said = error.strip().splitlines()
    assert code in (0, 1, 2), line
    assert "Traceback" not in error
    if code == 2:
        assert said, line
        assert said[-1].startswith("error: "), (line, said)
        assert not said[-1].startswith(("error: TypeError", "error: KeyError", "error: AttributeError")), (line, said)


def test_fuzzed_commands_are_all_there():
    assert {("demo",), ("bench", "soak"), ("bench", "parallel")} <= WORKING
    assert ("bench", "quality") not in WORKING
    assert {"generate", "plan", "quantize", "estimate", "recommend", "inspect", "convert", "demo"} <= {
        words[0] for words in COMMANDS
    }
    assert isinstance(typer.main.get_command(cli.app), click.Group | typer.core.TyperGroup)
