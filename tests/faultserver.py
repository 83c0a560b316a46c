"""A live server for the fault tests, its resources in use, and requests with commands for its toy workers."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.live import LiveServer, command_of, is_alive

PATIENCE_S = 30.0
WARM = "warm-"  # prefix of the names of pooled files (ovserve.wire.local.file_pool)
TINY_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4APMOGVHbHSAEEsAQ+yM8CbAAAAAElFTkSuQmCC"
)


@dataclass(frozen=True)
class Resources:
    """Resources in use by a front end: numbers of threads, descriptors, workers, and segments in its spool."""

    threads: int
    descriptors: int
    workers: int
    segments: int


class FaultServer(LiveServer):
    """A live server that restarts workers quickly. The workers are toys, or with `real=True` the real ones.

    `toy_options` is the `plugin_config` of the toys (tests.toys).
    """

    def __init__(
        self, spool: Path, *arguments: str, real: bool = False, toy_options: dict[str, Any] | None = None, **known: Any
    ):
        quick = ["--restart_delay_s", "0.02", "--max_restart_delay_s", "1", "--terminate_timeout_s", "2"]
        toys = [] if real or "--config" in arguments else ["--plugin_config", json.dumps(toy_options or {})]
        module = ("ovserve",) if real else ("tests.toyserver",)
        self.spool = spool
        super().__init__(*quick, *toys, *arguments, spool=spool, module=module, **known)

    @contextmanager
    def client(self, timeout_s: float = 60.0) -> Iterator[httpx.Client]:
        """Open a client without a limit on connections."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # Without TLS; a client that can verify certificates takes 20 ms of a processor to create.
        with httpx.Client(base_url=self.url, timeout=timeout_s, limits=limits, verify=False) as client:
            yield client

    def edit(self, client: httpx.Client, prompt: str, **fields: Any) -> httpx.Response:
        """Send an edit; the prompt is the toy worker's command."""
        return client.post("/v3/images/edits", data={"prompt": prompt, **fields}, files={"image": ("a.png", TINY_PNG)})

    def generate(self, client: httpx.Client, prompt: str, **fields: Any) -> httpx.Response:
        """Send a generation, which has no upload."""
        return client.post("/v3/images/generations", json={"prompt": prompt, **fields})

    def model_status(self) -> dict[str, Any]:
        """Return the status of the only model: ready, reason, queued, running, and so on."""
        document: dict[str, Any] = self.fetch("/v3/models")[1]["data"][0]
        return document

    def resources(self) -> Resources:
        """Return the resources in use now."""
        pid = self.process.pid
        return Resources(
            threads=len(os.listdir(f"/proc/{pid}/task")),
            descriptors=len(descriptors_of(pid)),
            workers=len(self.workers()),
            segments=len(self.segments()),
        )

    def segments(self) -> list[str]:
        """Return the names of the segments in the spool, without the warm files kept for the next uploads."""
        names = [path.name for path in self.spool.rglob("*") if path.is_file()]
        return [name for name in names if name != "lock" and not name.startswith(WARM)]

    def until(self, is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Poll until a condition is true that no descriptor signals. Raises AssertionError with the log in it."""
        end = time.monotonic() + patience_s
        while not is_so():
            assert time.monotonic() < end, f"still not true after {patience_s:g} s:\n" + "\n".join(self.log[-40:])
            time.sleep(0.01)

    def until_released(self, before: Resources) -> None:
        """Wait until no more resources are in use than before."""
        self.until(lambda: _fits(self.resources(), before))

    def workers(self) -> list[int]:
        """Return the process ids of the workers.

        Found by the parent of every process: the kernel's lists of children can miss some while other children exit.
        """
        return [pid for pid in _children(self.process.pid) if "spawn_main" in command_of(pid)]

    def tracker(self) -> int:
        """Return the process id of multiprocessing's resource tracker."""
        [pid] = [pid for pid in _children(self.process.pid) if "resource_tracker" in command_of(pid)]
        return pid

    def kill_worker(self, pid: int | None = None, number: int = signal.SIGKILL) -> int:
        """Send a signal to a worker, by default to the first; return its process id."""
        pid = pid or self.workers()[0]
        os.kill(pid, number)
        return pid

    def logged(self, *words: str) -> list[str]:
        """Return the log lines that contain all these words."""
        return [line for line in list(self.log) if all(word in line for word in words)]


def descriptors_of(pid: int) -> list[str]:
    """Return the targets of the open descriptors of a process, without warm files of the spool."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(path))
    return [target for target in found if WARM not in target]


def _children(parent: int) -> list[int]:
    """Return the ids of the processes with this parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return sorted(found)


def _fits(now: Resources, before: Resources) -> bool:
    return (
        now.threads <= before.threads
        and now.descriptors <= before.descriptors
        and now.workers == before.workers
        and now.segments <= before.segments
    )


def picture_of(reply: httpx.Response, number: int = 0) -> bytes:
    """Return the bytes of one picture of a reply; the status must be 200."""
    assert reply.status_code == 200, reply.text
    return base64.b64decode(reply.json()["data"][number]["b64_json"])


def gone(pid: int) -> bool:
    """Return whether a process has exited."""
    return not is_alive(pid)
