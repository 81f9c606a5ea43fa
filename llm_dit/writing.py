"""Writing files so that nothing is lost. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes beside the place and renames, so that an interrupted run leaves the file before."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
