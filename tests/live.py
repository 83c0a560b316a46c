"""A live server in a process of its own, as a user starts it: `python -m ovserve` on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["LiveServer", "children_of", "is_alive", "resident_bytes"]

PINNED = ["--streams", "2", "--threads", "1", "--max_batch", "8"]
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


class LiveServer:
    """`with LiveServer("--max_body_bytes", "1000") as server:`; `server.url` has no trailing slash."""

    def __init__(
        self,
        *arguments: str,
        spool: Path | None = None,
        wait_ready: bool = True,
        module: Sequence[str] = ("ovserve",),
        program: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> None:
        own = ["--port", "0"] if "--port" not in arguments else []
        if "--config" not in arguments and "--engine" not in arguments:
            own += PINNED  # measuring the best division of the device takes seconds at each start
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OVSERVE_")}
        if spool:
            own += ["--spool_dir", str(spool)]
        self.lines: list[str] = []
        self.log: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [*(program or (sys.executable, "-m", *module)), *own, *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
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
        """Wait for the ready line; the log is in the error when it does not come."""
        if not self._ready.wait(READY_TIMEOUT_S) or not any(line.startswith("ready ") for line in list(self.lines)):
            self.stop()
            raise AssertionError("the server did not become ready:\n" + "\n".join(self.log))

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`"""
        return next(line for line in self.lines if line.startswith("ready ")).removeprefix("ready ")

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.url.rpartition(":")[2])

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return [pid for pid in children_of(self.process.pid) if "spawn_main" in command_of(pid)]

    def fetch(self, path: str) -> tuple[int, Any]:
        """GET a JSON document: status and value."""
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
        """The exit code, once it has ended and its output is read."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)
        return code

    def stop(self) -> int:
        """End it with SIGTERM, by force after the timeout; the exit code."""
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
    """A process's command line; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def children_of(pid: int) -> list[int]:
    """Direct children of a process, over all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
