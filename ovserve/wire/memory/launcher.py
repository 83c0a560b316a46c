"""Workers as threads of one process, which a test can kill, hang and count."""

from __future__ import annotations

import os
import threading
import weakref

from ovserve.errors import LinkClosed
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.launcher import WorkerMain, WorkerSpec
from ovserve.wire.memory.link import MemoryLink, MemoryWorkerLink, open_memory_link

__all__ = ["MemoryLauncher", "MemoryProcess"]


class MemoryProcess:
    """`wire.launcher.WorkerProcess` for a thread.

    `kill` closes its link: the worker's next use of it raises LinkClosed.
    """

    def __init__(self, name: str, pid: int, end: MemoryWorkerLink) -> None:
        self.name = name
        self.pid = pid
        self.resident = 0
        self.leaving = False
        self.lost = False
        self.waiting = ""
        self.readiness = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.readiness)
        self._end = end
        self._reason = ""
        self._lock = threading.Lock()

    def is_alive(self) -> bool:
        """Return whether it runs."""
        return not self._reason

    def exit_reason(self) -> str:
        """Return why it has exited."""
        return self._reason or "still running"

    def was_lost(self) -> bool:
        """Return what a test has set as `lost`."""
        return self.lost

    def log_stacks(self) -> None:
        """Do nothing: its stack is among those of this process."""

    def kill(self) -> None:
        """End it at once. Idempotent."""
        self.exit("killed")

    def exit(self, reason: str) -> None:
        """Record the end; the first reason counts. Called by the worker's thread, or by a test as a crash."""
        with self._lock:
            if self._reason:
                return
            self._reason = reason
        self._end.close()
        os.eventfd_write(self.readiness, 1)

    def resident_bytes(self) -> int:
        """Return what a test has set as `resident`."""
        return self.resident

    def memory_bytes(self) -> int:
        """Return what a test has set as `resident`, until it has exited."""
        return 0 if self._reason else self.resident

    def node(self) -> str:
        """Return "": this process."""
        return ""

    def is_leaving(self) -> bool:
        """Return what a test has set as `leaving`."""
        return self.leaving

    def machine_bytes(self) -> int:
        """Return a bound that no test reaches by accident."""
        return 1 << 40

    def waits_for(self) -> str:
        """Return what its launcher had as `waiting` when it was started."""
        return self.waiting

    def close(self) -> None:
        """Do nothing: the descriptor is closed with the object."""


class MemoryLauncher:
    """`wire.launcher.Launcher` that starts threads.

    Attributes:
        started: every worker that was started, in order.
        waiting: what workers that are started from now on wait for, and never get; "": they begin at once.
    """

    def __init__(self, worker_main: WorkerMain, blobs: WorkerBlobs) -> None:
        self._worker_main = worker_main
        self._blobs = blobs
        self.started: list[MemoryProcess] = []
        self.waiting = ""

    def prepare(self) -> None:
        """Do nothing."""

    def start(self, spec: WorkerSpec) -> tuple[MemoryProcess, MemoryLink]:
        """Start a worker's thread."""
        link, end = open_memory_link(spec.model.name, spec.index, spec.incarnation)
        process = MemoryProcess(link.name, len(self.started) + 1, end)
        self.started.append(process)

        def run() -> None:
            """Run the worker and record how it ended."""
            try:
                self._worker_main(end, self._blobs, spec.profile, spec.model, spec.settings)
            except LinkClosed:
                process.exit("link closed")
            except BaseException as error:  # noqa: BLE001 - a crash of the worker, reported as such
                process.exit(f"crashed: {type(error).__name__}: {error}")
            else:
                process.exit("ended by itself with exit code 0")

        process.waiting = self.waiting
        if not self.waiting:
            threading.Thread(target=run, name=link.name, daemon=True).start()
        return process, link

    def overhead_bytes(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Do nothing."""
