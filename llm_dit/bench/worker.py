"""Measuring processes: started fresh, read as they report, given up when they hang."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

ROW: Final = "row"
FATAL: Final = "fatal"
DIED: Final = "died"
_MARK: Final = "@llm-dit-bench "
"""Before each report on standard output, where libraries print too."""


@dataclass(frozen=True)
class Message:
    """One report of a measuring process.

    Attributes:
        kind: ROW (a measurement), FATAL (the process can measure nothing; `value` says why) or DIED (it ended or hung
            without saying so itself).
        value: the row, or the error.
    """

    kind: str
    value: Any


def emit(kind: str, value: Any) -> None:
    """Reports to the process that started this one."""
    print(f"\n{_MARK}{json.dumps([kind, value])}", flush=True)


def messages(module: str, specification: Mapping[str, Any], timeout_s: float, launcher: Sequence[str] = ()) -> Iterator[Message]:
    """Runs `python -m module specification` and yields what it reports; a process that ends well may just stop.

    Args:
        specification: what the module reads as JSON from its only argument.
        timeout_s: seconds without a report after which the process is killed.
        launcher: a module that starts `-m module`, and its arguments, e.g. torch.distributed.run.
    """
    # Temporary files and compiled kernels go to a folder of the process's own: no other run's kernels are found there.
    with tempfile.TemporaryDirectory() as scratch:
        errors = Path(scratch) / "stderr"
        command = [sys.executable, "-W", "ignore", "-m", *launcher, module, json.dumps(specification)]
        environment = {**os.environ, "TMPDIR": scratch, "TRANSFORMERS_VERBOSITY": "error"}
        with errors.open("wb") as stderr:
            # A session of its own, so that the compiler's helpers can be stopped with it.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, start_new_session=True
            )
        try:
            yield from _read(process, errors, timeout_s)
        finally:
            _stop(process)


def _read(process: subprocess.Popen[str], errors: Path, timeout_s: float) -> Iterator[Message]:
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_feed, args=(process.stdout, lines), daemon=True).start()
    last = ""
    while True:
        try:
            line = lines.get(timeout=timeout_s)
        except queue.Empty:
            yield Message(DIED, f"given up after {timeout_s:.0f} s without a result")
            return
        if line is None:
            break
        message = Message(*json.loads(line))
        last = message.kind
        yield message
    code = process.wait()
    if (code and last != FATAL) or not last:
        yield Message(DIED, _last_words(errors, code))


def _feed(stdout: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stdout:
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
    lines.put(None)


def _last_words(errors: Path, code: int) -> str:
    """Why a process died: the signal, or the last line of its standard error."""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1][:300] if lines else 'the process ended'} (exit code {code})"


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends the process and what it started; after a normal end there is nothing left to do."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
