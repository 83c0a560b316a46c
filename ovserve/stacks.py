"""Writes what each thread of this process does into the log: its stack, one line for each thread.

In the front end on SIGUSR1, in the main thread. A worker has a thread that waits for the signal: signals are blocked in
all threads of a worker. It passes the signal on to its decoding processes, which have such a thread too. A thread
inside a native call shows the Python line that has made the call. A native call that holds the interpreter's lock holds
up the thread that writes, and so the lines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType

from ovserve.logs import fields

__all__ = ["log_stacks", "watch_for_stacks"]

MAX_FRAMES = 40  # of a stack, the innermost ones

log = logging.getLogger(__name__)


def log_stacks(process: str) -> None:
    """Log the stack of each thread, the innermost call first.

    Args:
        process: what the process is, such as `server`.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "")  # none: a thread that native code has started
        log.warning("stack", extra=fields(process=process, pid=os.getpid(), thread=name, stack=_stack(frame)))


def watch_for_stacks(process: str, children: Callable[[], Iterable[int]] = tuple) -> None:
    """Start a thread that calls `log_stacks` at each SIGUSR1, which has to be blocked in every thread.

    Args:
        process: what the process is.
        children: returns the ids of processes that get the signal too; they wait for it, or ignore it.
    """

    def watch() -> None:
        while True:
            signal.sigwaitinfo({signal.SIGUSR1})
            log_stacks(process)
            for child in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGUSR1)

    threading.Thread(target=watch, name="stacks", daemon=True).start()


def _stack(frame: FrameType | None) -> str:
    """Return the calls as `file.py:12 function`, joined by ` < `."""
    calls: list[str] = []
    while frame is not None and len(calls) < MAX_FRAMES:
        code = frame.f_code
        calls.append(f"{_short(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(calls)


def _short(path: str) -> str:
    """Return the last two parts of a path."""
    return "/".join(path.split("/")[-2:])
