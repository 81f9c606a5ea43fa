"""docs/plans.md is what its command writes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_dit.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "plans.md"


@pytest.mark.slow
def test_the_page_is_what_its_command_writes(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    command = re.search(r"^llm-dit (plan all .+)$", text, re.MULTILINE)[1]
    words = shlex.split(command)
    assert words[-2:] == ["--table", "docs/plans.md"]
    target = tmp_path / "plans.md"
    result = CliRunner().invoke(app, [*words[:-1], str(target)])
    assert result.exit_code == 0, result.output
    assert target.read_text(encoding="utf-8").replace(str(target), "docs/plans.md") == text
