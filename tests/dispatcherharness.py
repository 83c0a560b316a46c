"""A dispatcher under test, with its spool, jobs and workers that the test plays itself."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, State
from ovserve.errors import LinkClosed
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.link import Link
from ovserve.wire.local.pipes import open_link
from ovserve.wire.local.spool import Spool
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.memory.link import open_memory_link
from ovserve.wire.messages import Done, Grant, Message, Need, Picture, Prepared, Ready, Run
from ovserve.wire.request import ImageRequest

CONTEXT = multiprocessing.get_context("spawn")
PATIENCE_S = 10.0  # longest wait for an expected event
QUIET_S = 0.05  # wait after which an unexpected event would have arrived
SPOOL_BYTES = 16 << 20

M = TypeVar("M", bound=Message)


class FakeWorker:
    """The worker's end of a link; the test reads the commands and sends the reports.

    Args:
        model: the model that the link is for.
        index: the worker's index.
        blobs: its access to the front end's blobs.
        reads: whether to read commands from the start; otherwise call `reader.start()`.
        pipes: over real pipes, for what depends on their buffers or on raw bytes.
    """

    def __init__(self, model: str, index: int, blobs: WorkerBlobs, reads: bool = True, pipes: bool = False) -> None:
        self.blobs = blobs
        self.link: Link
        self.end: Any
        self.link, self.end = open_link(CONTEXT, model, index, 0) if pipes else open_memory_link(model, index, 0)
        self._pipes = pipes
        self.commands: queue.Queue[Message | None] = queue.Queue()  # None: the link is closed
        self._early: deque[Run] = deque()  # that came before a Grant
        self.reader = threading.Thread(target=self._read, daemon=True)
        if reads:
            self.reader.start()

    def _read(self) -> None:
        try:
            while True:
                self.commands.put(self.end.receive())
        except LinkClosed:
            self.commands.put(None)

    def send(self, *reports: Message) -> None:
        """Send reports to the dispatcher."""
        for report in reports:
            self.end.send(report)

    def expect(self, kind: type[M]) -> M:
        """Return the next command, which must be of this kind. A Run may come before a Grant; it is kept."""
        if kind is Run and self._early:
            return cast("M", self._early.popleft())
        message = self.commands.get(timeout=PATIENCE_S)
        while kind is Grant and isinstance(message, Run):
            self._early.append(message)
            message = self.commands.get(timeout=PATIENCE_S)
        assert isinstance(message, kind), message
        return message

    def expect_nothing(self) -> None:
        """Assert that no command arrives and the link stays open."""
        assert not self._early
        with pytest.raises(queue.Empty):
            assert self.commands.get(timeout=QUIET_S) is None

    def expect_closed(self) -> None:
        """Wait until the dispatcher has closed the link."""
        while (message := self.commands.get(timeout=PATIENCE_S)) is not None:
            assert isinstance(message, Message)

    def deliver(self, job: str, picture: int = 0, data: bytes = b"picture", partial: int = -1) -> None:
        """Report one picture, or one preview, with these bytes."""
        self.send(Prepared(job, "image2image", 8, 8, 1, 1, 1, 1), Need(job, picture, len(data), partial))
        grant = self.expect(Grant)
        self.blobs.fill(grant.storage, data)
        self.send(Picture(job, picture, 40 + picture, len(data), partial))

    def serve(self) -> str:
        """Run the next job, of one picture, and return its id."""
        run = self.expect(Run)
        self.deliver(run.job)
        self.send(Done(run.job, 1, 2, 3))
        return run.job

    def die(self) -> None:
        """Close the worker's side as the end of a process does."""
        if self._pipes:
            os.dup2(os.open(os.devnull, os.O_RDONLY), self.end.commands.fileno())
            self.end.reports.close()
        else:
            self.end.close()

    def close(self) -> None:
        """Close both ends of the link."""
        self.link.close()
        if self.reader.ident:
            self.reader.join(PATIENCE_S)
        self.end.close()


class DispatcherHarness:
    """A dispatcher with its spool, fake workers and jobs. Asserts on `close` that the spool is empty.

    Args:
        spool_directory: for tests of a real spool; None: blobs are kept in memory.
        options: settings other than the defaults.
    """

    def __init__(self, spool_directory: Path | None = None, **options: object) -> None:
        model = ModelSettings(name="toy", max_resolution=Resolution(512, 512))
        self.settings = Settings(models=(model,), **options)  # type: ignore[arg-type]
        self.spool: Any  # a MemoryBlobs or a Spool
        self.worker_blobs: WorkerBlobs
        if spool_directory is None:
            self.spool = self.worker_blobs = MemoryBlobs(SPOOL_BYTES)
        else:
            self.spool = Spool(spool_directory, SPOOL_BYTES)
            self.worker_blobs = self.spool.worker_blobs()
        self.changes = threading.Event()
        self.dispatcher = Dispatcher(self.spool, self.settings, on_change=self.changes.set)
        self.dispatcher.add_model("toy", 4)
        self.workers: list[FakeWorker] = []
        self.jobs: list[Job] = []
        self._ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_worker(
        self, capacity: int = 1, model: str = "toy", ready: bool = True, reads: bool = True, pipes: bool = False
    ) -> FakeWorker:
        """Attach a fake worker and wait until it is ready."""
        worker = FakeWorker(model, len(self.workers), self.worker_blobs, reads, pipes)
        self.workers.append(worker)
        self.dispatcher.attach(worker.link)
        if ready:
            worker.send(Ready(capacity, "fake"))
            # Not by the count of ready workers: one that has just died may still be counted.
            self.wait_until(lambda: worker.link.state.ready is not None)
        return worker

    def make_job(
        self, client: str = "c", timeout_s: float = 60.0, model: str = "toy", n: int = 1, partial_images: int = 0
    ) -> Job:
        """Return a new streaming job that is not admitted yet."""
        request = ImageRequest(task="edit", prompt="x", n=n, partial_images=partial_images, progress=True)
        job = Job(f"job-{next(self._ids)}", model, Client(client), request, Deadline.after(timeout_s))
        self.jobs.append(job)
        return job

    def admit(self, **known: object) -> Job:
        """Make a job with the arguments of `make_job` and admit it."""
        job = self.make_job(**known)  # type: ignore[arg-type]
        self.dispatcher.admit(job)
        return job

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        deadline = Deadline.after(PATIENCE_S)
        while not is_so():
            assert not deadline.is_expired()
            self.changes.wait(0.01)
            self.changes.clear()

    def wait_settled(self, job: Job) -> State:
        """Wait until a job is settled and return its state."""
        events(job, until_settled=True)
        return job.state

    def close(self) -> None:
        """Close the dispatcher, the jobs and the workers, then check that nothing is left in the spool."""
        self.dispatcher.close()
        for job in self.jobs:
            job.close()
        for worker in self.workers:
            worker.close()
        assert self.spool.used_bytes == 0
        if isinstance(self.spool, Spool):
            self.spool.close()


def events(job: Job, until_settled: bool = False) -> list[object]:
    """Return the next events of a job, or all until it is settled, waiting for them as a handler does."""
    found: list[object] = []
    deadline = Deadline.after(PATIENCE_S)
    while not found or until_settled:
        if until_settled and job.is_settled:
            break
        assert select.select([job.wakeup], [], [], deadline.remaining())[0], "the handler was not woken"
        found += job.take_events()
        if job.is_settled and not until_settled:
            break
    return found + job.take_events()
