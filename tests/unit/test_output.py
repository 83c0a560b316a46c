"""Lines that native libraries of a worker write: read from a pipe, and kept apart from the process's own log."""

from __future__ import annotations

import multiprocessing
import os
import queue
import subprocess
import sys

from ovserve.wire.local.output import MAX_LINE_BYTES, read_output

CODE = """
import multiprocessing.connection as connection, os, sys
from ovserve.wire.local.output import redirect_native_output
redirect_native_output(connection.Connection({fd}))
os.write(2, b"native\\n")
print("own", file=sys.stderr)
"""


def test_lines_are_passed_on_whatever_pieces_arrive_and_the_last_needs_no_end() -> None:
    reading, writing = multiprocessing.Pipe(duplex=False)
    found: queue.Queue[tuple[str, str]] = queue.Queue()
    read_output(reading, "m/0#0", lambda name, line: found.put((name, line)))
    for piece in (b"one\ntw", b"o\r\n\n\xff\n", b"x" * (MAX_LINE_BYTES + 5), b"\nlast words"):
        os.write(writing.fileno(), piece)
    writing.close()
    lines = [found.get(timeout=10) for _ in range(6)]
    assert {name for name, _ in lines} == {"m/0#0"}
    assert [line for _, line in lines] == ["one", "two", "\ufffd", "x" * MAX_LINE_BYTES, "x" * 5, "last words"]


def test_descriptor_2_is_the_pipe_and_the_log_goes_where_it_went() -> None:
    reading, writing = multiprocessing.Pipe(duplex=False)
    with reading:
        with writing:
            done = subprocess.run(
                [sys.executable, "-c", CODE.format(fd=writing.fileno())],
                pass_fds=(writing.fileno(),),
                capture_output=True,
                timeout=60,
                check=True,
            )
        assert (done.stderr, os.read(reading.fileno(), 100)) == (b"own\n", b"native\n")
