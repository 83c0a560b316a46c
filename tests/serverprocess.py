"""A server in a child process of multiprocessing: coverage of the unit tests then counts the front end as a whole."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from ovserve.cli.main import main
from tests.live import BUILTIN_PATH, PINNED

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


class _Lines(io.TextIOBase):
    """Standard output of the server: what is written goes to the test."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def write(self, text: str) -> int:
        """Send one piece of output."""
        self._connection.send(text)
        return len(text)


def _serve(connection: Connection, arguments: Sequence[str]) -> None:
    sys.stdout = _Lines(connection)  # type: ignore[assignment]
    sys.exit(main(arguments))


@contextmanager
def server_process(spool: Path, *arguments: str) -> Iterator[str]:
    """Serve the built-in model and yield the URL; then send SIGTERM, and check that the server ends with code 0."""
    defaults = ["--model_path", BUILTIN_PATH, "--port", "0", "--spool_dir", str(spool), *PINNED]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, [*defaults, *arguments]))
    process.start()
    theirs.close()
    try:
        assert ours.poll(READY_TIMEOUT_S), "the server did not become ready"
        line = ours.recv()
        assert line.startswith("ready "), line
        yield line.removeprefix("ready ").strip()
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(STOP_TIMEOUT_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
