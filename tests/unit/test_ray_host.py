"""The actor's side of a worker on a cluster, without Ray: a toy worker process, its files and its records."""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import shutil
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import LinkGarbage
from ovserve.models.profile import builtin_directory
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import Blob
from ovserve.wire.codec import decode, encode
from ovserve.wire.launcher import WorkerSpec
from ovserve.wire.messages import Done, Failed, Grant, Heartbeat, Message, Need, Picture, Ready, Run, Stop
from ovserve.wire.ray import host as hosts
from ovserve.wire.ray import records
from ovserve.wire.ray.host import Launch, Part, WorkerHost
from ovserve.wire.ray.node_files import NodeFiles
from ovserve.wire.request import ImageRequest
from tests import toys
from tests.fakehub import COMMIT, FakeHub
from tests.live import children_of

pytestmark = pytest.mark.processes

REQUEST, ROOM = "a" * 24, "b" * 24


class Running:
    """A host with a toy worker, and what it has yielded."""

    def __init__(self, directory: Path | None = None, **options: Any) -> None:
        profile = toys.toy_profile()
        if directory is not None:
            profile = dataclasses.replace(profile, directory=directory)
        spec = WorkerSpec(profile, ModelSettings(name="toy", **options), WorkerSettings.of(Settings()), 0, 0)
        self.host = WorkerHost("10.0.0.7/ab")
        self._messages: list[Message] = []
        self.pictures: dict[str, bytes] = {}
        self.log = b""
        self.status: dict[str, Any] = {}
        self.waited_for: list[str] = []
        self.reason = ""
        self._number = 0
        self._items = self.host.serve(Launch(toys.worker_main, spec).to_bytes())

    def deliver(self, message: Message | None, *parts: tuple[Part, bytes], number: int | None = None) -> None:
        """Send a command, with its parts; None: the link is closed."""
        line = encode(message) if message else b""
        self.host.deliver(
            self._number if number is None else number, line, [part for part, _ in parts], *[data for _, data in parts]
        )
        self._number += 1

    def until(self, kind: type | None) -> Message | None:
        """Read records until a message of this kind, or until the last record."""
        while True:
            while self._messages:
                if kind and isinstance(found := self._messages.pop(0), kind):
                    return found
                if not kind:
                    self._messages.clear()
            item = next(self._items, None)
            if item is None:
                assert kind is None, f"ended before a {kind}: {self.reason}"
                return None
            for record in map(bytes, records.unpack(item)):
                self._note(record[:1], record[1:])

    def _note(self, kind: bytes, content: bytes) -> None:
        if kind == records.LINES:
            self._messages += [decode(line) for line in content.splitlines()]
        elif kind == records.FILL:
            self.pictures[content[: records.STORAGE_CHARS].decode()] = content[records.STORAGE_CHARS :]
        elif kind == records.STATUS:
            self.status = records.decode_json(content)
            self.waited_for += filter(None, [self.status.get("waits_for", "")])
        elif kind == records.LOG:
            self.log += content
        else:
            self.reason = records.decode_json(content)["reason"]

    def run(self, prompt: str, **known: Any) -> None:
        """Send a job `j`."""
        request = ImageRequest(task="generation", prompt=prompt, **known)
        self.deliver(Run("j", REQUEST, 60.0), (Part(REQUEST, 0), request.to_json()))

    def close(self) -> None:
        self._items.close()  # type: ignore[attr-defined]
        del self.host, self._items  # its descriptor is closed with it


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(hosts, "default_directory", lambda: tmp_path)
    yield tmp_path
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # the launcher blocks signals in the thread that starts a worker


@pytest.fixture
def running(directory: Path, leak_guard: None) -> Iterator[Running]:
    made = Running()
    yield made
    made.close()
    assert not list(directory.iterdir()), "files are left"


def test_job_goes_in_and_its_picture_comes_out(running: Running) -> None:
    assert running.until(Ready)
    running.run("echo hello", seed=7)
    need = running.until(Need)
    assert isinstance(need, Need)
    running.deliver(Grant("j", 0, ROOM), (Part(ROOM, 0), b""))
    assert isinstance(running.until(Picture), Picture)
    assert running.pictures == {ROOM: b"echo hello|7"}
    assert running.until(Done)
    running.deliver(Stop())
    running.until(None)
    assert running.reason == "exited with code 0"
    assert running.status["pid"] > 0
    assert running.status["machine"] > running.status["memory"] >= 0


def test_command_that_overtakes_another_waits_for_it(running: Running) -> None:
    running.until(Ready)
    request = ImageRequest(task="generation", prompt="raise").to_json()
    running.deliver(Stop(), number=1)
    running.deliver(Run("j", REQUEST, 60.0), (Part(REQUEST, 0), request), number=0)
    assert isinstance(running.until(Failed), Failed)
    running.until(None)
    assert running.reason == "exited with code 0"


def test_command_that_cannot_be_executed_ends_the_worker(running: Running) -> None:
    running.until(Ready)
    running.deliver(Run("j", "../elsewhere", 60.0), (Part("../elsewhere", 0), b"x"))
    running.until(None)
    assert running.reason.startswith("a command failed: ValueError: not the id of a segment")


def test_command_that_never_arrives_ends_the_worker(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.until(Ready)
    monkeypatch.setattr(hosts, "GAP_TIMEOUT_S", 0.1)
    running.deliver(Stop(), number=1)
    running.until(None)
    assert running.reason == "command 0 did not arrive within 0.1 s"


def test_upload_keeps_its_offset(running: Running) -> None:
    running.until(Ready)
    image = b"twelve bytes"
    request = ImageRequest(task="edit", prompt="echo", images=(Blob(ROOM, 5000, len(image)),))
    running.deliver(Run("j", REQUEST, 60.0), (Part(REQUEST, 0), request.to_json()), (Part(ROOM, 5000), image))
    running.until(Need)
    running.deliver(Grant("j", 0, "c" * 24), (Part("c" * 24, 0), b""))
    running.until(Picture)
    assert running.pictures == {"c" * 24: image}


def test_full_node_refuses_an_upload_and_serves_the_next(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.until(Ready)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(NodeFiles, "add", refuse)
        running.run("echo x")
    failed = running.until(Failed)
    assert isinstance(failed, Failed)
    assert failed.error["error"] == "SpoolFull"
    running.run("echo y")
    assert running.until(Need)


def test_stacks_are_asked_of_the_worker_process(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.until(Ready)
    sent: list[tuple[int, int]] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", lambda *call: sent.append(call))
        running.host.log_stacks()
        running.run("raise")
        running.until(Failed)
    assert sent == [(running.status["pid"], signal.SIGUSR1)]


def test_closed_link_ends_the_worker(running: Running) -> None:
    running.until(Ready)
    running.deliver(None)
    running.until(None)
    assert "closed the link" in running.reason


def test_death_of_the_worker_is_the_last_record(running: Running) -> None:
    running.until(Ready)
    running.run("exit 7")
    running.until(None)
    assert running.reason == "exited with code 7"


def test_worker_that_breaks_the_protocol_is_ended(running: Running) -> None:
    running.until(Ready)
    running.run("garbage")
    running.until(None)
    assert running.reason.startswith("protocol violation")


# --- the model's directory on the node --------------------------------------------------------------------------------


REPOSITORY = "owner/shapes"


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(builtin_directory(), root / REPOSITORY)
    with FakeHub(root) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def test_missing_directory_is_a_load_failure_that_names_the_node(directory: Path, leak_guard: None) -> None:
    running = Running(directory / "absent")
    failed = running.until(Failed)
    running.until(None)
    assert isinstance(failed, Failed)
    assert not failed.job
    assert failed.error["message"] == running.reason
    assert running.reason.startswith(f"node 10.0.0.7/ab has no directory {directory}/absent; put it on storage that")
    running.close()


def test_model_is_pulled_once_a_node_and_shows_how_far_it_is(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, hub: FakeHub, leak_guard: None
) -> None:
    root = tmp_path_factory.mktemp("models")
    options = {"source_model": REPOSITORY, "revision": COMMIT}
    hub.faults.hold = threading.Event()
    first, second = (Running(root / REPOSITORY, **options) for _ in range(2))
    first.deliver(Stop())  # waits until there is a worker
    assert first.until(Heartbeat) == Heartbeat("pull")
    while not any(text.endswith("%") for text in first.waited_for):
        first.until(Heartbeat)
    assert first.waited_for[-1].startswith(f"node 10.0.0.7/ab pulls {REPOSITORY}: ")
    while not any("is running; waiting" in text for text in second.waited_for):
        second.until(Heartbeat)
    hub.faults.hold.set()
    first.until(None)
    assert first.reason == "exited with code 0"
    assert not first.status.get("waits_for")
    assert second.until(Ready)
    weights = {path: count for path, count in hub.downloads().items() if path.endswith(".bin")}
    assert weights
    assert set(weights.values()) == {1}, "pulled twice"
    hub.seen.clear()
    third = Running(root / REPOSITORY, **options)
    assert third.until(Ready)
    assert not hub.seen
    for each in (first, second, third):
        each.close()
    assert (root / REPOSITORY / "model_index.json").exists()


def test_pull_that_fails_is_a_load_failure_with_its_reason(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, hub: FakeHub, leak_guard: None
) -> None:
    hub.faults.gated = "hf_other"
    running = Running(tmp_path_factory.mktemp("models") / REPOSITORY, source_model=REPOSITORY, revision=COMMIT)
    failed = running.until(Failed)
    running.until(None)
    assert isinstance(failed, Failed)
    assert running.reason.startswith(f"node 10.0.0.7/ab cannot pull {REPOSITORY}: ")
    assert "is gated" in running.reason
    running.close()


def test_pull_ends_with_the_thread_of_the_actor(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, hub: FakeHub
) -> None:
    hub.faults.hold = threading.Event()
    running = Running(tmp_path_factory.mktemp("models") / REPOSITORY, source_model=REPOSITORY, revision=COMMIT)
    before = set(children_of(os.getpid()))
    pulls: set[int] = set()

    def start() -> None:
        while not hub.holding.is_set():
            running.until(Heartbeat)
        pulls.update(set(children_of(os.getpid())) - before)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(pulls) == 1
    descriptor = os.pidfd_open(pulls.pop())
    assert select.select([descriptor], [], [], 30)[0], "it still runs"
    os.close(descriptor)
    running.close()


def test_abandoned_host_kills_its_worker(directory: Path, leak_guard: None) -> None:
    running = Running()
    running.until(Ready)
    running.close()
    assert not list(directory.iterdir())


# --- what travels -----------------------------------------------------------------------------------------------------


def test_command_keeps_its_parts_and_large_data_stays_beside_it() -> None:
    parts = [Part(REQUEST, 0), Part(ROOM, 7), Part("c" * 24, 0), Part("d" * 24, 1)]
    data = [b"small", bytes(hosts.INLINE_BYTES), "reference", b""]
    command, others = hosts.pack_command(3, b"line\n", parts, data)
    assert others == [bytes(hosts.INLINE_BYTES), "reference"]
    assert hosts.unpack_command(command, [others[0], b"of the object"]) == (
        3,
        b"line\n",
        parts,
        [b"small", bytes(hosts.INLINE_BYTES), b"of the object", b""],
    )


def test_records_that_are_ready_together_travel_as_one_item() -> None:
    given = [records.lines_record([b"a\n"]), records.fill_record(ROOM, bytes(300)), records.exit_record("over")]
    assert [bytes(record) for record in records.unpack(records.pack(given))] == given
    assert list(records.unpack(records.pack([]))) == []


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_item_that_is_cut_is_refused(cut: int) -> None:
    with pytest.raises(LinkGarbage, match="an item that ends within a"):
        list(records.unpack(records.pack([b"Lab"])[:-cut]))


def test_record_without_a_kind_is_refused() -> None:
    with pytest.raises(LinkGarbage):
        list(records.unpack(bytes(4)))


def test_report_waits_for_the_next_one_unless_it_has_to_be_answered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(plugin_config='{"heartbeat_s": 60}')
    running.until(Ready)
    monkeypatch.setattr(hosts, "_GATHER_MS", 30_000)
    running.run("echo x")
    item = next(running._items)
    while b'"prepared"' not in item:  # the status of the process
        item = next(running._items)
    assert b'"need"' in item
    running.deliver(Grant("j", 0, ROOM), (Part(ROOM, 0), b""))
    item = next(running._items)
    while b'"picture"' not in item:
        item = next(running._items)
    assert b'"done"' in item
    running.close()
