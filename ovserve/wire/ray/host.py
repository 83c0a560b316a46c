"""The actor of one worker: starts the worker process on its node, and carries commands in and reports out.

    deliver (one thread, commands in order) ──▶ files, link ──▶ worker process
    serve   (one thread, a generator)       ◀── link, files ◀──

Nothing here imports Ray: `wire.ray.cluster` makes the actor class from this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import select
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from ovserve.deadline import Deadline
from ovserve.errors import InternalError, LinkClosed, LinkGarbage, ModelError, SpoolFull
from ovserve.machine import machine_memory_bytes
from ovserve.wire.codec import decode, encode
from ovserve.wire.launcher import WorkerMain, WorkerProcess, WorkerSpec
from ovserve.wire.link import Link
from ovserve.wire.local.launcher import LocalLauncher
from ovserve.wire.local.spool import default_directory
from ovserve.wire.messages import Done, Failed, Grant, Heartbeat, Message, Need, Picture, Run
from ovserve.wire.ray.node_files import NodeFiles
from ovserve.wire.ray.node_model import await_model
from ovserve.wire.ray.records import exit_record, fill_record, lines_record, log_record, pack, status_record

__all__ = ["INLINE_BYTES", "Launch", "Part", "WorkerHost", "pack_command", "unpack_command"]

# Up to this size an argument of a call is copied into the call itself, which is faster than an object.
INLINE_BYTES = 64 * 1024
_MEASURE_S = 1.0  # between two reports of the worker's memory
_END_S = 5.0  # for a killed process to exit
_REAP_S = 0.01
_GATHER_MS = 1  # that a report waits for the next one, unless the front end has to answer it or it ends a job
_LAST_READS = 4  # a pipe holds 64 KiB, one read takes as much
_LOG_BYTES = 65536  # of one read
_FULL_RETRY_S = 2
GAP_TIMEOUT_S = 30.0  # for a command that later ones have overtaken: Ray never runs a call whose argument is lost


@dataclass(frozen=True, slots=True)
class Launch:
    """What an actor starts. Travels as a pickle from the front end to its own actor."""

    main: WorkerMain
    spec: WorkerSpec

    def to_bytes(self) -> bytes:
        """Encode the record."""
        return pickle.dumps(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Launch:
        """Decode a record from `to_bytes`. Only for data of the own front end."""
        launch = pickle.loads(data)  # noqa: S301 - from the process that has created this actor
        if not isinstance(launch, cls):
            raise TypeError("not a Launch")
        return launch


@dataclass(frozen=True, slots=True)
class Part:
    """Where bytes that come with a command belong: at `offset` in the file named `storage`."""

    storage: str
    offset: int


def pack_command(number: int, line: bytes, parts: Sequence[Part], data: Sequence[Any]) -> tuple[bytes, list[Any]]:
    """Return the arguments of the call that brings a command: nearly all of it as one, for each costs time.

    Args:
        number: of the command.
        line: the message.
        parts: places of the uploads that come with it.
        data: for each part its bytes, or the reference of its object.
    """
    inside: list[bytes | None] = []
    others, left = [], INLINE_BYTES
    for content in data:
        if isinstance(content, bytes) and len(content) <= left:
            inside.append(content)
            left -= len(content)
        else:
            inside.append(None)
            others.append(content)
    return pickle.dumps((number, line, [(part.storage, part.offset) for part in parts], inside)), others


def unpack_command(command: bytes, others: Iterable[bytes]) -> tuple[int, bytes, list[Part], list[bytes]]:
    """Return number, message, parts and data of what `pack_command` has made. Only for data of the own front end."""
    number, line, parts, inside = pickle.loads(command)  # noqa: S301 - from the process that has created this actor
    left = iter(others)
    data = [next(left) if content is None else content for content in inside]
    return number, line, [Part(*part) for part in parts], data


class WorkerHost:
    """One worker on this node. `serve` is called once, `deliver` from one thread.

    Args:
        node: the name of the node, for logs and metrics.
    """

    def __init__(self, node: str = "") -> None:
        self._node = node
        self._lock = threading.Lock()  # guards the link, the files and what follows
        self._link: Link | None = None
        self._files: NodeFiles | None = None
        self._next_number = 0
        self._early: dict[int, tuple[bytes, Sequence[Part], Sequence[bytes]]] = {}  # commands that overtook others
        self._gap_since: float | None = None  # since when a command is missing
        self._refusals: list[bytes] = []  # reports of this actor in the place of the worker
        self._is_urgent = False  # the last reports that were read must not wait for others
        self._is_started = False  # the worker was started: before, commands wait
        self._end_reason = ""  # why `serve` has to end the worker
        self._wants_stacks = False  # `serve` has to ask the worker for its stacks
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not closed with the worker: a late command would write to a descriptor that has been reused.
        weakref.finalize(self, os.close, self._wakeup)

    def deliver(self, number: int, line: bytes, parts: Sequence[Part], *data: bytes) -> None:
        """Give the worker a command.

        Args:
            number: its position; commands that arrive out of order wait for those before them.
            line: the message, as wire.codec encodes it; empty: the front end has closed the link.
            parts: places of the uploads that come with it.
            data: their bytes.
        """
        with self._lock:
            self._early[number] = line, parts, data
            if self._is_started:
                self._execute_early()

    def log_stacks(self) -> None:
        """Make the worker write the stacks of its threads into its log. Returns at once."""
        self._wants_stacks = True
        os.eventfd_write(self._wakeup, 1)

    def serve(self, launch: bytes) -> Iterator[bytes]:
        """Start the worker, once its model is on this node; yield items of records until it has exited."""
        given = Launch.from_bytes(launch)
        log_read = -1
        process: WorkerProcess | None = None
        try:
            files = NodeFiles(default_directory())
            with self._lock:
                self._files = files
            try:
                for state in await_model(given.spec.profile, given.spec.model, self._node):
                    waiting = status_record(clock=time.monotonic(), node=self._node, waits_for=state)
                    yield pack([waiting, lines_record([encode(Heartbeat("pull"))])])
            except ModelError as error:
                failure = lines_record([encode(Failed("", InternalError(str(error)).to_wire()))])
                yield pack([failure, exit_record(str(error))])
                return
            log_read, log_write = os.pipe()
            os.set_blocking(log_read, False)
            with _standard_error(log_write):
                process, link = LocalLauncher(given.main, files.blobs).start(self._named(given.spec))
            with self._lock:
                self._link, self._is_started = link, True
                self._execute_early()
            yield from self._watch(process, link, log_read)
        finally:
            if process is not None:
                _reap(process)
            with self._lock:
                if self._link is not None:
                    self._link.close()
                self._link, files_left, self._files = None, self._files, None
            if files_left is not None:
                files_left.close()
            if log_read >= 0:
                os.close(log_read)

    def _execute_early(self) -> None:
        """Execute the commands that no missing one precedes. Called with the lock."""
        while (found := self._early.pop(self._next_number, None)) is not None:
            self._next_number += 1
            try:
                self._execute(*found)
            except Exception as error:  # noqa: BLE001 - without this command the worker would wait for ever
                self._end_reason = f"a command failed: {type(error).__name__}: {error}"
                os.eventfd_write(self._wakeup, 1)
        if not self._early:
            self._gap_since = None
        elif self._gap_since is None:
            self._gap_since = time.monotonic()

    def _named(self, spec: WorkerSpec) -> WorkerSpec:
        """Return the description of the worker with the name of this node, for its log."""
        return dataclasses.replace(spec, settings=dataclasses.replace(spec.settings, node=self._node))

    def _watch(self, process: WorkerProcess, link: Link, log_read: int) -> Iterator[bytes]:
        """Yield items until the worker has exited; kill it if the link was closed or it broke the protocol."""
        measure_at, reason = 0.0, ""
        events = select.poll()
        for descriptor in (self._wakeup, link.readiness, process.readiness, log_read):
            events.register(descriptor, select.POLLIN)
        while True:
            ready: list[bytes] = []
            if time.monotonic() >= measure_at:
                measure_at = time.monotonic() + _MEASURE_S
                ready.append(
                    status_record(
                        clock=time.monotonic(),
                        node=self._node,
                        pid=process.pid,
                        resident=process.resident_bytes(),
                        memory=process.memory_bytes(),
                        machine=machine_memory_bytes(),
                    )
                )
            is_over = not process.is_alive()  # before the reports are read: what it has sent before its end is complete
            try:
                for _ in range(_LAST_READS if is_over else 1):
                    ready += self._read_reports(link)
                if ready and not self._is_urgent and events.poll(_GATHER_MS):
                    ready += self._read_reports(link)
            except LinkClosed:
                if not is_over and not wait([process.readiness], _END_S):
                    reason = "the worker has closed its link"
            except LinkGarbage as error:
                reason = f"protocol violation: {error}"
            if output := _read(log_read):
                ready.append(log_record(output))
            reason = reason or self._end_reason or self._missing_command()
            is_last = bool(is_over or reason or not process.is_alive())
            if is_last:
                ready.append(exit_record(reason or process.exit_reason()))
            if ready:
                yield pack(ready)
            if is_last:
                return
            events.poll(max(0.0, measure_at - time.monotonic()) * 1000)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
            if self._wants_stacks:
                self._wants_stacks = False
                process.log_stacks()

    def _missing_command(self) -> str:
        """Return why the worker has to end if a command has been missing for too long, else ""."""
        since = self._gap_since
        if since is None or time.monotonic() - since < GAP_TIMEOUT_S:
            return ""
        return f"command {self._next_number} did not arrive within {GAP_TIMEOUT_S:g} s"

    def _read_reports(self, link: Link) -> list[bytes]:
        """Return the records of what the worker has sent. Raises LinkClosed and LinkGarbage."""
        with self._lock:
            records = [lines_record(self._refusals)] if self._refusals else []
            self._refusals, self._is_urgent = [], bool(records)
            try:
                messages = link.receive()
            except LinkClosed:
                if not records:
                    raise
                messages = []
            lines: list[bytes] = []
            for message in messages:
                self._is_urgent |= isinstance(message, Need | Done | Failed)
                if filled := self._note_report(message):
                    records += [lines_record(lines)] if lines else []
                    records.append(filled)
                    lines = []
                lines.append(encode(message))
            if lines:
                records.append(lines_record(lines))
        return records

    def _note_report(self, message: Message) -> bytes:
        """Follow one report; return the record that has to precede it, or b""."""
        if self._files is None:
            return b""
        if isinstance(message, Need):
            self._files.note_need(message.job, message.picture, message.size)
        elif isinstance(message, Picture):
            taken = self._files.take(message.job, message.picture)
            # The file has the announced size, which may be an upper limit.
            return fill_record(taken[0], taken[1][: message.size]) if taken else b""
        elif isinstance(message, Done | Failed):
            self._files.end(message.job)
        return b""

    def _execute(self, line: bytes, parts: Sequence[Part], data: Sequence[bytes]) -> None:
        if self._link is None or self._files is None:
            return
        if not line:
            self._end_reason = "the front end has closed the link"
            os.eventfd_write(self._wakeup, 1)
            return
        message = decode(line.removesuffix(b"\n"))
        if isinstance(message, Run):
            try:
                for part, content in zip(parts, data, strict=True):
                    self._files.add(message.job, part.storage, part.offset, content)
            except OSError as error:
                self._files.end(message.job)
                self._refuse(message.job, error)
                return
        elif isinstance(message, Grant) and not message.storage:
            self._files.skip_room(message.job, message.picture)
        # A Grant that comes without a part names a segment that was released: there is no file for it.
        elif isinstance(message, Grant) and parts:
            if not self._files.make_room(message.job, message.picture, message.storage):
                message = Grant(message.job, message.picture, "")
        elif isinstance(message, Grant):
            self._files.skip_room(message.job, message.picture)
        try:
            self._link.send(message)  # what the pipe does not take is sent by `receive`: the link becomes ready for it
        except LinkClosed as error:  # `serve` reads the reports that are left, then the end
            self._end_reason = str(error) if self._link.state.is_clogged else ""
            os.eventfd_write(self._wakeup, 1)

    def _refuse(self, job: str, error: OSError) -> None:
        failure = SpoolFull(
            f"no space for the upload on the worker's node: {error.strerror}", retry_after_s=_FULL_RETRY_S
        )
        self._refusals.append(encode(Failed(job, failure.to_wire())))
        os.eventfd_write(self._wakeup, 1)


def _reap(process: WorkerProcess) -> None:
    """Kill a process if it still runs, wait until it has exited, and free its handle."""
    end = Deadline.after(_END_S)
    while process.is_alive() and not end.is_expired():
        process.kill()
        time.sleep(_REAP_S)  # its readiness comes a moment before its exit
    if not process.is_alive():
        process.close()


@contextlib.contextmanager
def _standard_error(write_end: int) -> Iterator[None]:
    """Let processes started in the context write to this pipe, and not import this process's main module.

    A spawned process imports the main module of its parent: here that of Ray, which takes a second and 80 MB. The
    pipe's end is closed on exit.
    """
    main, own = sys.modules["__main__"], os.dup(2)
    file = main.__dict__.pop("__file__", None)
    try:
        os.dup2(write_end, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(write_end)
        if file is not None:
            main.__file__ = file


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _LOG_BYTES)
    except BlockingIOError:
        return b""
