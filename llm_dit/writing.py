"""Reading and writing files so that nothing is lost, and what is broken is named. Imports nothing heavy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_place(path: Path | None) -> Path | None:
    """The path; raises ValueError if it is to be written and its folder is not there. None is not to be written."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {str(path.absolute().parent)!r} to write {path.name!r} into: make it first")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name at the end, so that an interrupted run leaves the file before."""
    beside = path.with_name(f"{path.name}.part")
    yield beside
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a `new_file`."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name at the end; what an interrupted run left beside it goes first."""
    beside = path.with_name(f"{path.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    yield beside
    beside.rename(path)


def read_json_file(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, with its name, for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; download it, or write it, again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, and should: download it, or write it, again")
    return found
