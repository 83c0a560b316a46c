"""A live server in a separate process, started as a user does: `python -m ovserve` on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["BUILTIN_NAME", "BUILTIN_PATH", "LiveServer", "children_of", "is_alive", "resident_bytes"]

BUILTIN_PATH = "builtin:shapes"  # the built-in model as the option `path`
BUILTIN_NAME = "ovserve-builtin"  # the built-in model as the request field `model`
PINNED = ["--streams", "2", "--threads", "1", "--max_batch", "8"]
_MODELS = {"--config", "--config_path", "--model_repository_path"}  # flags that name the models
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


class LiveServer:
    """A running server: `with LiveServer("--max_body_bytes", "1000") as server:`.

    Args:
        arguments: options. The port is 0 unless given; threads and streams are fixed unless an engine is given.
        spool: directory of the spool.
        wait_ready: return when the server is ready.
        module: what to start with `python -m`.
        model: value of --model_path, unless the arguments contain --model_path or --config; None: no --model_path.
        program: what to start in place of `python -m module`.
        cwd: directory to start it in.
        environment: variables for the server, besides those of this process that are not of ovserve.

    Attributes:
        lines: standard output so far.
        log: standard error so far.
        process: the front end.
    """

    def __init__(
        self,
        *arguments: str,
        spool: Path | None = None,
        wait_ready: bool = True,
        module: Sequence[str] = ("ovserve",),
        model: str | None = BUILTIN_PATH,
        program: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        defaults = ["--port", "0"] if not {"--port", "--rest_port"} & set(arguments) else []
        if not _MODELS & set(arguments) and "--engine" not in arguments:
            defaults += PINNED  # without it, each start measures threads and streams for seconds
        if model is not None and not {*_MODELS, "--model_path"} & set(arguments):
            defaults += ["--model_path", model]
        variables = {key: value for key, value in os.environ.items() if not key.startswith("OVSERVE_")}
        if spool:
            defaults += ["--spool_dir", str(spool)]
        self.lines: list[str] = []
        self.log: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [*(program or (sys.executable, "-m", *module)), *defaults, *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables | dict(environment or {}),
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.log), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        if wait_ready:
            self.await_ready()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            if line.startswith("ready "):
                self._ready.set()
        self._ready.set()
        stream.close()

    def await_ready(self) -> None:
        """Wait for the ready line. Raises AssertionError with the log if the server does not become ready."""
        if not self._ready.wait(READY_TIMEOUT_S) or not any(line.startswith("ready ") for line in list(self.lines)):
            self.stop()
            raise AssertionError("the server did not become ready:\n" + "\n".join(self.log))

    @property
    def url(self) -> str:
        """Base URL, `http://127.0.0.1:PORT`, without a trailing slash."""
        return next(line for line in self.lines if line.startswith("ready ")).removeprefix("ready ")

    @property
    def port(self) -> int:
        """Port that the server listens on."""
        return int(self.url.rpartition(":")[2])

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        return [pid for pid in children_of(self.process.pid) if "spawn_main" in command_of(pid)]

    def fetch(self, path: str) -> tuple[int, Any]:
        """GET a JSON document; return the status and the value."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def signal(self, number: int) -> None:
        """Send a signal to the front end."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait until the process has exited and its output is read; return the exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)
        return code

    def stop(self) -> int:
        """Stop the server with SIGTERM; return its exit code. After the timeout, kill it and raise TimeoutExpired."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                return self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()
                raise
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def command_of(pid: int) -> str:
    """Return the command line of a process; empty if it has exited."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def children_of(pid: int) -> list[int]:
    """Return the ids of the direct children of a process, of all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
