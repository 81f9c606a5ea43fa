"""Results of a benchmark: a JSON file of rows that a later run goes on from, and Markdown tables of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..quantization import detect_hardware
from ..writing import write_text

Row = dict[str, Any]
Columns = Sequence[tuple[str, str]]

SPEED_COLUMNS: Final = (
    ("geometry", ""),
    ("implementation", ""),
    ("method", ""),
    ("mode", ""),
    ("ms", ".1f"),
    ("spread_ms", ".1f"),
    ("ratio", ".2f"),
    ("weights_gib", ".2f"),
    ("peak_gib", ".2f"),
    ("first_call_s", ".1f"),
    ("relerr", ".4f"),
    ("floor_ms", ".1f"),
)
"""Columns of the table of `bench speed`, each with the format of its values."""
END_TO_END_COLUMNS: Final = (
    ("geometry", ""),
    ("method", ""),
    ("mode", ""),
    ("saved", ""),
    ("import_s", ".1f"),
    ("load_s", ".1f"),
    ("encode_s", ".2f"),
    ("steps_s", ".2f"),
    ("decode_s", ".2f"),
    ("first_picture_s", ".1f"),
    ("picture_s", ".2f"),
    ("peak_gib", ".2f"),
)
"""The same with `--end-to-end`."""


@dataclass(frozen=True)
class Selection:
    """Names of what to measure: all combinations that exist. An empty tuple stands for a default."""

    geometries: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What a benchmark is about to do.

    Attributes:
        cases: dataclasses whose fields are columns of the rows and tell them apart.
        measure: measures some of them and yields a row for each, in order; a failed one has `error`.
        columns: those of the table.
    """

    cases: Sequence[Any]
    measure: Callable[[Sequence[Any]], Iterable[Row]]
    columns: Columns


def report(
    job: Job,
    show: Callable[[str], None],
    output: Path | None = None,
    table: Path | None = None,
    plot: Path | None = None,
    again: bool = False,
) -> None:
    """Does the job, shows every row as it comes, and writes what files were asked for.

    Args:
        show: prints a line.
        output: the result file to go on from and to write.
        table: a file for the Markdown table.
        plot: a PNG.
        again: measure what `output` holds already too.

    Raises:
        ValueError: before anything is measured, for files that cannot be written.
    """
    _check_plot(job, plot)
    show(header(job.columns))
    rows = []
    for row in collect(job, output, again):
        rows.append(row)
        show(line(row, job.columns))
    if table:
        lines = [header(job.columns), *(line(row, job.columns) for row in rows)]
        write_text(table, "\n".join(lines) + "\n")
    if plot:
        from .plots import draw

        draw(rows, plot)


def _check_plot(job: Job, plot: Path | None) -> None:
    if plot is None:
        return
    if job.columns is not SPEED_COLUMNS:
        raise ValueError("--plot draws the speed of single steps: leave it out with --end-to-end")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'llm-dit[bench]'")


def read_rows(path: Path | None) -> list[Row]:
    """The rows of a result file; none if there is no file.

    Raises:
        ValueError: if the file holds something else.
    """
    if path is None or not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): give another file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} is no list of results: give another file")
    return rows


def collect(job: Job, output: Path | None = None, again: bool = False) -> Iterator[Row]:
    """Yields the rows of all cases, first those that `output` holds from this device, and keeps `output` up to date.

    Failed cases are measured again in any event.
    """
    rows = read_rows(output)
    device = detect_hardware().name
    keys = {case: {**asdict(case), "device": device} for case in job.cases}
    done = {} if again else {case: row for case, key in keys.items() if (row := _find(rows, key)) and "error" not in row}
    yield from done.values()
    for row in job.measure([case for case in job.cases if case not in done]):
        key = next(key for key in keys.values() if _find([row], key))
        rows = [old for old in rows if not _find([old], key)] + [row]
        if output:
            write_text(output, json.dumps(rows, indent=2) + "\n")
        yield row


def _find(rows: Iterable[Row], key: Row) -> Row | None:
    return next((row for row in rows if key.items() <= row.items()), None)


def header(columns: Columns) -> str:
    """The first two lines of a Markdown table."""
    names = " | ".join(name.replace("_", " ").replace(" gib", " GiB") for name, _ in columns)
    return f"| {names} |\n|{'---|' * len(columns)}"


def line(row: Row, columns: Columns) -> str:
    """One line of the table; a failed row says its error after the names."""
    cells = []
    for name, form in columns:
        value = row.get(name)
        cells.append("" if value is None else format(value, form))
    if "error" in row:
        error = str(row["error"]).replace("|", "/")
        cells[next(place for place, (_, form) in enumerate(columns) if form)] = error
    return "| " + " | ".join(cells) + " |"
