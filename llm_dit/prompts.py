"""Many prompts: a list of them shared out between any number of processes, each result once, resumable.

All that the processes share is the output folder. Its `manifest.jsonl` has one row for each prompt that is done. A process takes
a prompt by locking a file of that number, which the operating system unlocks when the process ends, however it ends: what a
killed worker was at is taken by another one, or by the next run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .generate import GenerateOptions, call_arguments, check_sizes, load, write_output
from .load import pipeline_class_of
from .mixin import QuantizablePipelineMixin
from .names import nearest
from .parallel import rank, use_own_device
from .terminal import console
from .writing import write_text

MANIFEST: Final = "manifest.jsonl"
LOCKS: Final = ".locks"
WAIT_S: Final = 0.5
"""Seconds between two looks at what the other processes have done, once nothing is left to take."""
Row = dict[str, Any]


class Prompt(BaseModel):
    """A line of the list. What it leaves out is as the command line says; `seed` then is that of the command line plus the number
    of prompts before it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    negative_prompt: str | None = None
    seed: int | None = None
    height: Annotated[int | None, Field(ge=1)] = None
    width: Annotated[int | None, Field(ge=1)] = None
    frames: Annotated[int | None, Field(ge=1)] = None
    steps: Annotated[int | None, Field(ge=1)] = None
    guidance: float | None = None


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file: one a line, or JSON lines, objects with the fields of `Prompt`. Empty lines say nothing.

    Raises:
        ValueError: if there is no such file, it is empty, or a line cannot be read, with its number.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} of prompts")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` also breaks where a prompt may not end
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: write one prompt a line") from None
    found = tuple(_parsed(line.strip(), f"{path.name}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise ValueError(f"{str(path)!r} holds no prompt: write one a line")
    return found


def _parsed(line: str, where: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(prompt=line)
    try:
        return Prompt.model_validate(json.loads(line))
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])  # a misspelt field is also missing
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{where}: unknown field {name!r}: {nearest(name, tuple(Prompt.model_fields))}") from None
        raise ValueError(f"{where}: {name}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{where} starts with a brace and is not JSON: {error}") from None


@dataclass(frozen=True)
class Task:
    """One prompt of the list.

    Attributes:
        number: its place, from 1.
        options: how it is generated, with the file to write.
    """

    number: int
    options: GenerateOptions

    @property
    def asked(self) -> Row:
        """What identifies the result: a folder never mixes results of different requests."""
        options = self.options
        call = {name: value for name, value in options.call.items() if value is not None}
        loaded = {name: str(value) for name, value in options.load.items()}
        return {
            "number": self.number,
            "prompt": options.prompt,
            "seed": options.seed,
            "file": options.output.name,
            "model": options.model,
            **({"guidance": options.guidance} if options.guidance is not None else {}),
            "call": call,
            "load": loaded,
        }


def tasks_of(prompts: Sequence[Prompt], options: GenerateOptions) -> tuple[Task, ...]:
    """The list with the command line's options under each prompt's own; `options.output` is the folder.

    Raises:
        ValueError: for a size that the pipeline cannot make, with the number of its prompt.
    """
    family = pipeline_class_of(options.model).family
    ending = ".mp4" if family.generation.video else ".png"
    tasks = tuple(_task(number, prompt, options, ending) for number, prompt in enumerate(prompts, 1))
    for task in tasks:
        try:
            check_sizes(family, task.options.call)
        except ValueError as error:
            raise ValueError(f"prompt {task.number}: {error}") from None
    return tasks


def _task(number: int, prompt: Prompt, options: GenerateOptions, ending: str) -> Task:
    names = {"frames": "num_frames", "steps": "num_inference_steps"}
    own = prompt.model_dump(exclude={"prompt", "seed", "guidance"}, exclude_none=True)
    changed = replace(
        options,
        prompt=prompt.prompt,
        output=options.output / f"{number:04d}{ending}",
        call={**options.call, **{names.get(name, name): value for name, value in own.items()}},
        guidance=options.guidance if prompt.guidance is None else prompt.guidance,
        seed=options.seed + number - 1 if prompt.seed is None else prompt.seed,
    )
    return Task(number, changed)


class Folder:
    """The output folder of a list: what is done, and who is at what.

    Args:
        path: made if it is not there.
        tasks: the whole list.

    Raises:
        ValueError: if the folder holds results of another list, or is a file.
    """

    def __init__(self, path: Path, tasks: Sequence[Task]) -> None:
        if path.is_file():
            raise ValueError(f"{str(path)!r} is a file, and a list of prompts is written into a folder: give another name")
        self.path = path
        self.tasks = tasks
        self.started = time.time()
        (path / LOCKS).mkdir(parents=True, exist_ok=True)
        self.open_tasks()

    def rows(self) -> dict[int, Row]:
        """The manifest, by number."""
        try:
            lines = (self.path / MANIFEST).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return {}
        return {row["number"]: row for row in map(json.loads, filter(None, lines))}

    def open_tasks(self) -> list[Task]:
        """Those without a result. What failed in another process of this run counts as settled; a later run tries it again.

        Raises:
            ValueError: if there are results of another request, which may have begun after this one.
        """
        rows = self.rows()
        self._check(rows)
        return [task for task in self.tasks if not self._settled(rows.get(task.number))]

    def _check(self, rows: Mapping[int, Row]) -> None:
        for task in self.tasks:
            row = rows.get(task.number)
            differs = [name for name, value in task.asked.items() if row is not None and row.get(name) != value]
            if differs:
                what = {"load": "quantization, or another argument of loading", "call": "size, or number of steps"}
                raise ValueError(
                    f"{str(self.path)!r} holds results of another request, whose prompt {task.number} has another "
                    f"{what.get(differs[0], differs[0])}: give another folder"
                )

    def _settled(self, row: Row | None) -> bool:
        if row is None:
            return False
        return row["ended"] >= self.started if "error" in row else (self.path / row["file"]).is_file()

    @contextmanager
    def take(self) -> Iterator[Task | None]:
        """A task that no other process has, which is this one's while it lasts; None if there is none to take now."""
        for task in self.open_tasks():
            lock = FileLock(self.path / LOCKS / f"{task.number:04d}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if task in self.open_tasks():  # it may have been finished between the look and the lock
                    yield task
                    return
            finally:
                lock.release()
        yield None

    def record(self, row: Row) -> None:
        """Puts a row into the manifest, which is whole at every moment."""
        with FileLock(self.path / LOCKS / MANIFEST):
            rows = {**self.rows(), row["number"]: row}
            lines = (json.dumps(rows[number], ensure_ascii=False) for number in sorted(rows))
            write_text(self.path / MANIFEST, "".join(f"{line}\n" for line in lines))


@dataclass(frozen=True)
class Ran:
    """What a process has to say when the list is done.

    Attributes:
        pipe: its pipeline; None if everything was done before.
        made: results that it made itself.
        load_seconds: of its pipeline.
        failed: by number, the error of each prompt that could not be generated, by whichever process.
    """

    pipe: QuantizablePipelineMixin | None
    made: int = 0
    load_seconds: float = 0.0
    failed: Mapping[int, str] = field(default_factory=dict)


def run_prompts(
    prompts: Sequence[Prompt], options: GenerateOptions, ready: Callable[[QuantizablePipelineMixin], None] = lambda pipe: None
) -> Ran:
    """Generates a list, alone or together with other processes that were given the same arguments.

    Args:
        options: of every prompt; `output` is the folder, `prompt` is not read, `seed` is that of the first.
        ready: is called with the loaded pipeline before the first prompt.

    Raises:
        ValueError: before anything is loaded, for a size that cannot be made, or if the folder holds results of another request.
    """
    folder = Folder(options.output, tasks_of(prompts, options))
    if not folder.open_tasks():
        return Ran(None)
    if not options.device.startswith("cpu"):
        use_own_device()
    start = time.perf_counter()
    pipe = load(options)
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter() - start
    ready(pipe)
    made = 0
    with _progress(len(folder.tasks), shown=rank() == 0) as advance:
        while left := folder.open_tasks():
            advance(len(folder.tasks) - len(left))
            with folder.take() as task:
                if task is None:
                    time.sleep(WAIT_S)  # others are at what is left; should one of them be killed, it can be taken
                    continue
                row = _generated(pipe, task)
                folder.record(row)
                made += "error" not in row
        advance(len(folder.tasks))
    rows = folder.rows()
    failed = {task.number: rows[task.number]["error"] for task in folder.tasks if "error" in rows[task.number]}
    return Ran(pipe, made, loaded, failed)


def _generated(pipe: QuantizablePipelineMixin, task: Task) -> Row:
    """Generates one prompt and writes its file; returns its row, with the error if it failed."""
    start = time.perf_counter()
    row: Row = {**task.asked, "methods": {report.name: report.method for report in pipe.quantization_report}}
    try:
        call = call_arguments(pipe, task.options)
        write_output(task.options.output, pipe(**call), pipe, call)
    except torch.AcceleratorError:  # the device is lost to this process, and every prompt after would fail too
        raise
    except Exception as error:  # one prompt's failure is not that of the list; it is told at the end
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    return {**row, "seconds": round(time.perf_counter() - start, 3), "rank": rank(), "ended": time.time()}


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over the whole list; call what it gives with how many prompts are settled."""
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown) as progress:
        bar = progress.add_task("", total=total)
        yield lambda done: progress.update(bar, completed=done)
