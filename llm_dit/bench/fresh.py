"""One measurement in a process of its own.

It is started anew and not forked from one that has imported everything: torchao asks for the GPU when it is imported, and CUDA
does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class FreshProcessError(RuntimeError):
    """The measurement failed; in one line, why."""


def in_fresh_process(function: Callable[..., Any], *args: Any, timeout_s: float = 900) -> Any:
    """`function(*args)`, both of which and the result must be picklable, in a fresh process.

    Raises:
        FreshProcessError: if it raises, dies or takes longer than `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise FreshProcessError(f"given up after {timeout_s:.0f} s without a result")
        error, result = receiver.recv()
    except EOFError:
        process.join()
        raise FreshProcessError(f"the process ended without a result (exit code {process.exitcode})") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error:
        raise FreshProcessError(error)
    return result


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = function(*args)
    except Exception as error:
        sender.send((f"{type(error).__name__}: {error}", None))
    else:
        sender.send(("", result))
