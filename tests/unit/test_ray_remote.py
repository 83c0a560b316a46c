"""The bridge's part of one worker, without Ray: its threads between the pipes of a link and a host in this process."""

from __future__ import annotations

import json
import multiprocessing
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import LaunchError, LinkClosed
from ovserve.logs import current_level, set_level
from ovserve.wire.codec import decode, encode
from ovserve.wire.local.pipes import PipeLink, open_link
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import Cancel, Failed, Grant, Heartbeat, LogLevel, Message, Run, Span
from ovserve.wire.ray import records
from ovserve.wire.ray.host import INLINE_BYTES, Part
from ovserve.wire.ray.launcher import RayProcess
from ovserve.wire.ray.remote import RemoteWorker
from ovserve.wire.ray.uploads import Uploads
from ovserve.wire.request import ImageRequest

pytestmark = pytest.mark.processes

PATIENCE_S = 30


class FakeHost:
    """A host whose records the test gives; None: silence for the whole timeout."""

    def __init__(self) -> None:
        self.records: queue.Queue[bytes | LaunchError | None] = queue.Queue()
        self.commands: queue.Queue[tuple[Message | None, list[Part], list[Any]]] = queue.Queue()
        self.killed = threading.Event()
        self.stacks_wanted = threading.Event()

    def read(self, timeout_s: float) -> bytes | None:
        record = self.records.get(timeout=PATIENCE_S)
        if isinstance(record, LaunchError):
            raise record
        return None if record is None else records.pack([record])

    def deliver(self, line: bytes, parts: Any, data: Any) -> None:
        self.commands.put((decode(line.removesuffix(b"\n")) if line else None, list(parts), list(data)))

    def log_stacks(self) -> None:
        self.stacks_wanted.set()

    def kill(self) -> None:
        self.killed.set()
        self.records.put(LaunchError("killed"))


class Setup:
    def __init__(self, spool: Spool) -> None:
        self.reports: list[Message] = []
        self.puts: list[bytes] = []
        self.is_full = False
        self.host = FakeHost()
        self.link, end = open_link(multiprocessing.get_context("spawn"), "toy", 0, 0)
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = RayProcess("toy/0#0", own)
        self.uploads = Uploads(spool.worker_blobs(), self._put)
        self.worker = RemoteWorker("toy/0#0", end, other, self.uploads, 0.0, patience_s=0.0)
        self.worker.place = lambda: self.host

    def _put(self, data: bytes) -> str:
        if self.is_full:
            raise MemoryError("the object store is full")
        self.puts.append(data)
        return f"object {len(self.puts)}"

    def place(self) -> None:
        self.host.records.put(records.status_record(pid=7, resident=1, memory=2, machine=3))
        self.worker.start()

    def report(self) -> Message:
        while True:
            assert select.select([self.link.readiness], [], [], PATIENCE_S)[0]
            if got := self.link.receive():
                self.reports += got[1:]
                return got[0]

    def until_exit(self) -> str:
        assert select.select([self.process.readiness], [], [], PATIENCE_S)[0]
        while self.process.is_alive():
            select.select([self.process.readiness], [], [], PATIENCE_S)
        return self.process.exit_reason()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path, 16 << 20)
    yield made
    made.close()


@pytest.fixture
def setup(spool: Spool, leak_guard: None) -> Iterator[Setup]:
    made = Setup(spool)
    yield made
    made.link.close()
    made.host.records.put(LaunchError("the test is over"))
    made.worker.join(PATIENCE_S)
    made.process.close()
    made.worker.status.close()
    del made.worker  # its descriptor is closed with it


def closed(link: PipeLink) -> bool:
    try:
        while True:
            select.select([link.readiness], [], [], PATIENCE_S)
            link.receive()
    except LinkClosed:
        return True


def test_status_reaches_the_handle_and_reports_the_link(setup: Setup) -> None:
    setup.place()
    setup.host.records.put(records.lines_record([encode(Heartbeat("idle"))]))
    assert setup.report() == Heartbeat("idle")
    assert setup.process.is_alive()
    assert (setup.process.pid, setup.process.resident_bytes(), setup.process.memory_bytes()) == (7, 1, 2)
    assert setup.process.machine_bytes() == 3
    setup.host.records.put(records.exit_record("exited with code 0"))
    assert setup.until_exit() == "exited with code 0"
    assert setup.process.memory_bytes() == 0
    assert closed(setup.link)


def test_instants_of_a_node_are_on_the_clock_of_the_front_end(setup: Setup) -> None:
    ahead_s = 1e6
    setup.host.records.put(records.status_record(pid=7, clock=time.monotonic() - ahead_s))
    setup.worker.start()
    began_at = time.monotonic()
    span = Span("j", "prepare", began_at - ahead_s, began_at - ahead_s + 0.5)
    setup.host.records.put(records.lines_record([encode(Heartbeat("idle")), encode(span)]))
    assert setup.report() == Heartbeat("idle")
    report = setup.reports.pop()
    assert isinstance(report, Span)
    assert report.ended_at - report.started_at == pytest.approx(0.5)
    assert abs(report.started_at - began_at) < PATIENCE_S


def test_run_carries_its_uploads_and_a_large_one_is_put_once(setup: Setup, spool: Spool) -> None:
    setup.place()
    small, large = spool.put(b"small"), spool.put(bytes(INLINE_BYTES + 1))
    images = (small.blob(1, 3), large.blob(0, INLINE_BYTES + 1))
    request = spool.put(ImageRequest(task="edit", prompt="", images=images).to_json())
    for job in ("a", "b"):
        setup.link.send(Run(job, request.id, 60.0))
        command, parts, data = setup.host.commands.get(timeout=PATIENCE_S)
        assert command == Run(job, request.id, 60.0)
        assert parts == [Part(request.id, 0), Part(small.id, 1), Part(large.id, 0)]
        assert data[1:] == [b"mal", "object 1"]
    assert len(setup.puts) == 1
    assert len(setup.uploads) == 1
    for segment in (small, large, request):
        segment.release()
    setup.uploads.sweep()
    assert len(setup.uploads) == 0, "the object outlives its segment"
    setup.link.send(Run("c", request.id, 60.0))
    assert setup.host.commands.get(timeout=PATIENCE_S)[1:] == ([], [])


def test_grant_says_whether_its_segment_still_exists(setup: Setup, spool: Spool) -> None:
    setup.place()
    room = spool.create(10, reserve=10)
    setup.link.send(Grant("j", 0, room.id))
    assert setup.host.commands.get(timeout=PATIENCE_S)[1] == [Part(room.id, 0)]
    setup.host.records.put(records.fill_record(room.id, b"0123456789"))
    setup.host.records.put(records.lines_record([encode(Heartbeat("idle"))]))
    setup.report()
    assert bytes(room.view[:10]) == b"0123456789"
    room.release()
    setup.link.send(Grant("j", 0, room.id))
    assert setup.host.commands.get(timeout=PATIENCE_S)[1] == []
    setup.host.records.put(records.fill_record(room.id, b"late"))  # is dropped
    setup.host.records.put(records.lines_record([encode(Heartbeat("idle"))]))
    assert setup.report() == Heartbeat("idle")


def test_full_object_store_fails_the_job_alone(setup: Setup, spool: Spool) -> None:
    setup.is_full = True
    setup.place()
    image = spool.put(bytes(INLINE_BYTES + 1))
    request = spool.put(ImageRequest(task="edit", prompt="", images=(image.blob(0, INLINE_BYTES + 1),)).to_json())
    setup.link.send(Run("j", request.id, 60.0))
    report = setup.report()
    assert isinstance(report, Failed)
    assert report.error["error"] == "SpoolFull"
    setup.link.send(Cancel("j"))
    assert setup.host.commands.get(timeout=PATIENCE_S)[0] == Cancel("j")
    image.release()
    request.release()


def test_worker_that_is_not_placed_beats_and_says_what_it_waits_for(setup: Setup) -> None:
    setup.host.records.put(None)
    setup.worker.start()
    assert setup.report() == Heartbeat("placing")
    assert setup.until_exit() == "not placed: no node of the cluster had room for it in 0 s"
    assert setup.process.was_lost()


def test_kill_before_the_cluster_is_connected_ends_it(setup: Setup) -> None:
    setup.worker.place = lambda: None
    setup.worker.waits_for = lambda: "the cluster is away"
    setup.worker.start()
    assert setup.report() == Heartbeat("placing")
    assert setup.process.is_alive()
    assert setup.process.waits_for() == "the cluster is away"
    setup.worker.is_lost = True
    setup.worker.kill()
    assert setup.until_exit() == "killed"
    assert setup.process.was_lost()


def test_head_that_does_not_answer_is_reported_and_its_late_actor_killed(setup: Setup) -> None:
    answered = threading.Event()

    def place() -> FakeHost:
        assert answered.wait(PATIENCE_S)
        return setup.host

    setup.worker.place = place
    setup.worker.start()
    assert setup.report() == Heartbeat("placing")
    assert setup.process.is_alive()
    assert "does not answer" in setup.process.waits_for()
    setup.worker.kill()
    assert setup.until_exit() == "killed"
    answered.set()
    assert setup.host.killed.wait(PATIENCE_S)


def test_lost_actor_is_an_exit_with_its_reason(setup: Setup) -> None:
    setup.place()
    setup.host.records.put(LaunchError("ActorDiedError: its node is gone"))
    assert setup.until_exit() == "ActorDiedError: its node is gone"
    assert not setup.process.was_lost(), "it may have died of its model"
    assert setup.host.killed.is_set()


def test_level_of_the_log_applies_to_the_bridge_and_goes_on_to_the_worker(setup: Setup) -> None:
    setup.place()
    before = current_level()
    for level in ("error", "debug"):
        setup.link.send(LogLevel(level))
        assert setup.host.commands.get(timeout=PATIENCE_S)[0] == LogLevel(level)
        assert current_level() == level
    set_level(before)


def test_stacks_are_asked_for_once_the_worker_is_placed(setup: Setup) -> None:
    setup.worker.log_stacks()  # has no worker yet
    setup.host.records.put(records.status_record(pid=7, node="127.0.0.1/ab"))
    setup.worker.start()
    setup.host.records.put(records.lines_record([encode(Heartbeat("idle"))]))
    setup.report()
    assert not setup.host.stacks_wanted.is_set()
    setup.worker.log_stacks()
    assert setup.host.stacks_wanted.is_set()


def test_closed_link_is_passed_on(setup: Setup) -> None:
    setup.place()
    setup.link.close()
    assert setup.host.commands.get(timeout=PATIENCE_S)[0] is None


def test_lost_bridge_is_an_exit() -> None:
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = RayProcess("toy/0#0", own)
    other.send(json.dumps({"pid": 3, "waits_for": "room"}).encode())
    assert process.is_alive()
    other.close()
    assert not process.is_alive()
    assert process.exit_reason() == "the connection to the Ray cluster was lost"
    assert process.was_lost()
    process.kill()
    process.close()
