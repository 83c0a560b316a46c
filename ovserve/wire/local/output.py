"""What native libraries of a worker write to standard error: lines from a pipe, read in the front end.

The front end reads it, because a library writes its last words before it aborts the worker. The worker's own log and
Python's tracebacks go to the standard error of the front end, without this pipe.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

__all__ = ["OnOutput", "read_output", "redirect_native_output"]

MAX_LINE_BYTES = 2000  # what is longer is several lines
_READ_BYTES = 65536

OnOutput = Callable[[str, str], None]


def redirect_native_output(output: Connection) -> None:
    """Make descriptor 2 the pipe, and `sys.stderr` a copy of what descriptor 2 was. Runs in: worker, before it logs."""
    sys.stderr.flush()
    own = os.dup(2)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stderr = open(own, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - stays open


def read_output(output: Connection, name: str, on_output: OnOutput) -> None:
    """Start a thread that passes on each line until the worker has ended, and then closes `output`."""
    threading.Thread(target=_read, args=(output, name, on_output), name=f"output of {name}", daemon=True).start()


def _read(output: Connection, name: str, on_output: OnOutput) -> None:
    rest = b""
    with output:
        while data := os.read(output.fileno(), _READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            while len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest[:MAX_LINE_BYTES]], rest[MAX_LINE_BYTES:]
            for line in lines:
                _pass_on(line, name, on_output)
    _pass_on(rest, name, on_output)


def _pass_on(line: bytes, name: str, on_output: OnOutput) -> None:
    for start in range(0, len(line), MAX_LINE_BYTES):
        text = line[start : start + MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            on_output(name, text)
