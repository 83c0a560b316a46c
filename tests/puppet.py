"""A worker on a cluster that a test moves: the test's calls are made in the worker process.

test: Puppet ── socket ──▶ worker process: the methods of its WorkerLink and WorkerBlobs
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from ovserve.errors import LinkClosed
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import Blob, BlobStore, WorkerBlobs
from ovserve.wire.launcher import Launcher, WorkerSpec
from ovserve.wire.link import WorkerLink
from ovserve.wire.messages import Grant, Heartbeat, Message, Need, Picture, Run
from ovserve.wire.request import ImageRequest
from tests.toys import toy_profile
from tests.wirecontract import becomes_ready, receive

__all__ = ["Puppet", "PuppetBlobs", "puppet_main"]


def puppet_main(
    link: WorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> None:
    """Make the calls that come over the socket, until it or the link is closed."""
    with Client(json.loads(model.plugin_config)["socket"]) as calls:
        while True:
            try:
                name, arguments = calls.recv()
            except EOFError:
                return
            try:
                calls.send(_call(link, blobs, name, arguments))
            except Exception as error:  # noqa: BLE001 - the test gets it
                calls.send(error)
            if name == "close":
                os._exit(0)  # a link is closed by the end of its worker


def _call(link: WorkerLink, blobs: WorkerBlobs, name: str, arguments: Any) -> Any:
    if name == "open":
        with blobs.open(*arguments) as view:
            return bytes(view)
    if name in {"read", "fill"}:
        return getattr(blobs, name)(*arguments)
    return getattr(link, name)(*arguments)


class Puppet:
    """A worker that is started with a launcher, and its `WorkerLink` as the test sees it."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        path = str(folder / "puppet.sock")
        model = ModelSettings(name="toy", plugin_config=json.dumps({"socket": path}))
        with Listener(path) as listener:
            spec = WorkerSpec(toy_profile(), model, WorkerSettings.of(Settings()), 2, 3)
            self.process, self.link = launcher.start(spec)
            self.calls: Connection = listener.accept()
        self.is_closed = False

    def settle(self) -> None:
        """Read what was reported for the worker before it was placed, up to a report of its own."""
        self.send(Heartbeat("settled"))
        while self.link.state.phase != "settled":
            assert becomes_ready(self.link)
            self.link.receive()

    def call(self, name: str, *arguments: object) -> Any:
        """Make a call in the worker; return what it returns, or raise what it raises."""
        try:
            self.calls.send((name, arguments))
            result = self.calls.recv()
        except (EOFError, OSError):
            raise LinkClosed("the worker has exited") from None
        if isinstance(result, Exception):
            raise result
        return result

    def receive(self) -> Message:
        message: Message = self.call("receive")
        return message

    def send(self, message: Message) -> None:
        with suppress(LinkClosed):  # a node ends a worker that breaks the protocol
            self.call("send", message)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.call("close")


class PuppetBlobs:
    """`WorkerBlobs` of the worker. Storage reaches it with the commands that name it, so each call sends one first."""

    def __init__(self, puppet: Puppet, store: BlobStore) -> None:
        self._puppet = puppet
        self._store = store
        self._jobs = (f"job-{number}" for number in itertools.count())

    @contextmanager
    def open(self, blob: Blob) -> Iterator[memoryview]:
        request = self._store.put(ImageRequest(task="edit", prompt="", images=(blob,)).to_json())
        self._run(request.id)
        request.release()
        yield memoryview(self._puppet.call("open", blob))

    def read(self, storage: str) -> bytes:
        if len(storage) < 100:  # else it fits no message
            self._run(storage)
        data: bytes = self._puppet.call("read", storage)
        return data

    def fill(self, storage: str, data: bytes | memoryview) -> None:
        puppet, request = self._puppet, self._store.put(ImageRequest(task="edit", prompt="").to_json())
        job = self._run(request.id)
        request.release()
        puppet.send(Need(job, 0, len(data)))
        receive(puppet.link, 1)
        puppet.link.send(Grant(job, 0, storage))
        puppet.receive()
        puppet.call("fill", storage, bytes(data))
        puppet.send(Picture(job, 0, 0, len(data)))
        receive(puppet.link, 1)

    def _run(self, request: str) -> str:
        job = next(self._jobs)
        self._puppet.link.send(Run(job, request, 60.0))
        self._puppet.receive()
        return job
