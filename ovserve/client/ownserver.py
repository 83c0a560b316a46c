"""A server of this machine with the built-in model, started for one command and stopped after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ovserve.client.server import NoServer

__all__ = ["own_server"]

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
_READY = "ready "
_ENDING = (signal.SIGHUP, signal.SIGTERM)


@contextmanager
def own_server() -> Iterator[str]:
    """Start a server on a free port of the loopback interface, and yield its URL.

    Until it has stopped, SIGHUP (of a terminal that is closed) and SIGTERM raise KeyboardInterrupt, as Ctrl-C does.
    Call it in the main thread.

    Raises:
        NoServer: it did not become ready; the message has the last line of its log.
    """
    before = {number: signal.signal(number, _interrupt) for number in _ENDING if not _is_ignored(number)}
    try:
        with _running() as process:
            yield from _ready_url(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN  # as nohup(1) does


@contextmanager
def _running() -> Iterator[subprocess.Popen[str]]:
    """Start the server; it has ended when the block ends."""
    command = [sys.executable, "-m", "ovserve", "serve", "--host", "127.0.0.1", "--port", "0", "--model_path"]
    process: subprocess.Popen[str] | None = None
    # Blocked until the process is known: an exception from a handler would leave it running. It inherits the mask, and
    # blocks these signals anyway, as it waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_ENDING})
    try:
        try:
            process = subprocess.Popen(  # noqa: S603 - this package, with fixed arguments
                [*command, "builtin:shapes", "--log_level", "warning"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the command, which then stops the server
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *_ENDING})
        yield process
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)


def _ready_url(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the server's URL once it is ready, and read its output until it has ended. Raises NoServer."""
    lines: list[str] = []
    log: list[str] = []
    is_ready = threading.Event()

    def read_output() -> None:
        for line in process.stdout or ():
            lines.append(line.rstrip("\n"))
            if line.startswith(_READY):
                is_ready.set()
        is_ready.set()

    def read_log() -> None:
        for line in process.stderr or ():
            log.append(line.rstrip("\n"))
            del log[:-20]

    readers = [threading.Thread(target=read, daemon=True) for read in (read_output, read_log)]
    for reader in readers:
        reader.start()
    try:
        is_ready.wait(READY_TIMEOUT_S)
        found = [line.removeprefix(_READY) for line in lines if line.startswith(_READY)]
        if not found:
            raise NoServer(f"the server with the built-in model did not start: {log[-1] if log else 'no reason given'}")
        yield found[0]
    finally:
        process.terminate()  # ends the output
        for reader in readers:
            reader.join(STOP_TIMEOUT_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
