"""One worker of the cluster, seen from the bridge: carries commands to its actor, and records back.

    front end ── commands ──▶ thread `commands` ── calls ────▶ actor
              ◀── reports ─── thread `reports`  ◀─ records ───
              ◀── status ────

Runs in: bridge.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import queue
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ovserve.deadline import Deadline
from ovserve.errors import BlobGone, LaunchError, LinkClosed, LinkGarbage, SpoolFull
from ovserve.logs import fields, set_level
from ovserve.wire.codec import LineBuffer, decode, encode
from ovserve.wire.local.pipes import PipeWorkerLink
from ovserve.wire.messages import Failed, Grant, Heartbeat, LogLevel, Run, Span
from ovserve.wire.ray import records
from ovserve.wire.ray.host import Part
from ovserve.wire.ray.uploads import Uploads

__all__ = ["PATIENCE_S", "Host", "RemoteWorker"]

PATIENCE_S = 10.0  # an actor is placed in a second or two, and a connection takes a few more
_BEAT_S = 2.0  # between two heartbeats of a worker that is not placed yet
_KILLED_S = 3.0  # for an actor to be seen ended after it was killed
_CARRIED_S = 5.0  # for the command in hand to be sent, when the worker has ended
_READ_BYTES = 65536
_FULL_RETRY_S = 5
_REASON_CHARS = 300
_SPAN = b'"kind":"span"'

log = logging.getLogger(__name__)


class Host(Protocol):
    """An actor with one worker (`wire.ray.cluster.RemoteHost`)."""

    def read(self, timeout_s: float) -> bytes | None:
        """Return the next item of records, or None at the timeout. Raises LaunchError when the actor has ended."""

    def deliver(self, line: bytes, parts: Any, data: Any) -> None:
        """Send a command."""

    def log_stacks(self) -> None:
        """Make the worker write the stacks of its threads into its log."""

    def kill(self) -> None:
        """End the actor."""


class RemoteWorker:
    """The two threads of one worker.

    Args:
        name: `model/index#incarnation`.
        link: the worker's end of the link.
        status: a socket to the front end's handle: packets out, `kill` in.
        uploads: what commands need.
        place_timeout_s: for the cluster to place the actor.
        patience_s: after it, the front end gets the reason for which it is not placed, and refuses jobs.

    Attributes:
        place: creates the actor; None while there is no connection. Raises LaunchError.
        waits_for: why there is none.
        bundle: what its node must have free.
        node: the name of its node, once it was placed.
        is_lost: it ends because the cluster was lost, or had no place for it in time.
    """

    def __init__(
        self,
        name: str,
        link: PipeWorkerLink,
        status: socket.socket,
        uploads: Uploads,
        place_timeout_s: float,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.name = name
        self.node = ""
        self.bundle: Mapping[str, float] = {}
        self.status = status
        self.is_lost = False
        self._created_at = time.monotonic()
        self._is_leaving = False
        self._link = link
        self.place: Callable[[], Host | None] = lambda: None
        self.waits_for: Callable[[], str] = str
        self._uploads = uploads
        self._place_timeout_s = place_timeout_s
        self._host: Host | None = None
        self._killed = threading.Event()
        self._clock_ahead_s = math.inf  # how much this machine's clock is ahead of the node's
        self._patience = Deadline.after(patience_s)
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._ended)
        self._reports_lock = threading.Lock()
        self._commands = threading.Thread(target=self._carry_commands, name=f"commands {name}", daemon=True)
        self._reports = threading.Thread(target=self._run, name=f"reports {name}", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._reports.start()

    @property
    def has_ended(self) -> bool:
        """Whether its end was reported to the front end."""
        return not self._reports.is_alive()

    def waits_s(self) -> float:
        """Return how long it has waited for its place; 0 once it was placed."""
        return 0.0 if self.node else time.monotonic() - self._created_at

    def join(self, timeout_s: float) -> None:
        """Wait until its threads have ended."""
        self._reports.join(timeout_s)

    def report_leaving(self) -> None:
        """Tell the front end that its node is being drained. Idempotent."""
        if not self._is_leaving:
            self._is_leaving = True
            self._send_status(leaving=True)

    def log_stacks(self) -> None:
        """Make the worker write the stacks of its threads into its log, if it was placed."""
        if self._host is not None and self.node:
            self._host.log_stacks()

    def kill(self) -> None:
        """End the actor; `reports` then ends within _KILLED_S. Idempotent."""
        self._killed.set()
        if self._host is not None:
            self._host.kill()

    # --- reports ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the bridge has failed"
        try:
            reason = self._serve()
        except LaunchError as error:
            reason = str(error)
        except LinkClosed:
            reason = "the front end has closed the link"
        except Exception:
            log.exception("remote worker failed", extra=fields(worker=self.name))
        finally:
            if self._host is not None:
                self._host.kill()
            os.eventfd_write(self._ended, 1)
            if self._commands.ident:
                self._commands.join(_CARRIED_S)
            else:
                self._link.commands.close()
            self._send_status(exit="killed" if self._killed.is_set() else reason, lost=self.is_lost)
            with self._reports_lock:
                self._link.reports.close()

    def _serve(self) -> str:
        """Place the worker, then pass on its records; return why it has ended. Raises LaunchError and LinkClosed."""
        while (host := self._create_host()) is None:
            if self._killed.wait(_BEAT_S):
                return ""
        self._host = host
        place_by, given_up = Deadline.after(self._place_timeout_s), Deadline(float("inf"))
        is_placed = False
        while True:
            item = host.read(_BEAT_S if is_placed else _BEAT_S / 2)
            if self._killed.is_set():
                given_up = min(given_up, Deadline.after(_KILLED_S))
                host.kill()  # again: the first call may have come before the actor existed
                if item is None and given_up.is_expired():
                    return ""
            if item is None:
                if not is_placed:
                    self._report_waiting("no node of the cluster has room for it")
                    if place_by.is_expired():
                        self.is_lost = True
                        return f"not placed: no node of the cluster had room for it in {self._place_timeout_s:g} s"
                continue
            if not is_placed:
                is_placed = True
                self._commands.start()
            for record in records.unpack(item):
                if reason := self._pass_on(record):
                    return reason

    def _create_host(self) -> Host | None:
        """Create the actor; return None while there is no connection, or when the worker was killed meanwhile.

        In a thread: without the cluster's head, Ray waits for it, and the front end has to know. Raises LaunchError.
        """
        created: queue.SimpleQueue[Host | LaunchError | None] = queue.SimpleQueue()

        def create() -> None:
            """Create the actor and put it, or the error, into `created`."""
            host: Host | LaunchError | None
            try:
                host = self.place()
            except LaunchError as error:
                host = error
            except Exception as error:  # noqa: BLE001 - Ray raises many kinds
                host = LaunchError(f"{type(error).__name__}: {error}"[:_REASON_CHARS])
            created.put(host)
            if self._killed.is_set() and host is not None and not isinstance(host, LaunchError):
                host.kill()

        threading.Thread(target=create, name=f"create {self.name}", daemon=True).start()
        while True:
            try:
                host = created.get(timeout=_BEAT_S)
            except queue.Empty:
                self._report_waiting("the head of the cluster does not answer")
                if self._killed.is_set():
                    return None
                continue
            if isinstance(host, LaunchError):
                raise host
            if host is None:
                self._report_waiting(self.waits_for())
            return host

    def _pass_on(self, record: memoryview) -> str:
        """Pass on one record; return the reason of the end when it is the last. Raises LinkClosed and LinkGarbage."""
        kind, content = bytes(record[:1]), record[1:]
        if kind == records.LINES:
            lines = bytes(content)
            self._write(self._in_own_time(lines) if _SPAN in lines else lines)
        elif kind == records.FILL:
            storage = bytes(content[: records.STORAGE_CHARS]).decode("ascii", "replace")
            try:
                self._uploads.blobs.fill(storage, content[records.STORAGE_CHARS :])
            except BlobGone:
                log.debug("picture for a released segment", extra=fields(worker=self.name))
        elif kind == records.STATUS:
            values = records.decode_json(content)
            self._note_clock(values.pop("clock", None))
            self.node = str(values.get("node", ""))
            self._send_status(**values)
        elif kind == records.LOG:
            sys.stderr.buffer.write(content)
            sys.stderr.buffer.flush()
        elif kind == records.EXIT:
            return str(records.decode_json(content).get("reason") or "exited")
        else:
            raise LinkGarbage(f"a record of unknown kind {kind!r}")
        return ""

    def _note_clock(self, clock: object) -> None:
        """Compare the monotonic clock of the node with that of this machine; the record with the least delay counts."""
        if isinstance(clock, float):
            self._clock_ahead_s = min(self._clock_ahead_s, time.monotonic() - clock)

    def _in_own_time(self, lines: bytes) -> bytes:
        """Return reports with the instants of Spans on this machine's clock."""
        changed = []
        for line in lines.splitlines():
            message = decode(line)
            if isinstance(message, Span) and math.isfinite(self._clock_ahead_s):
                started_at, ended_at = message.started_at + self._clock_ahead_s, message.ended_at + self._clock_ahead_s
                message = dataclasses.replace(message, started_at=started_at, ended_at=ended_at)
            changed.append(encode(message))
        return b"".join(changed)

    def _report_waiting(self, reason: str) -> None:
        if self._patience.is_expired():
            self._send_status(waits_for=reason)
        self._write(encode(Heartbeat("placing")))

    def _send_status(self, **values: object) -> None:
        try:
            self.status.send(json.dumps(values).encode(), socket.MSG_DONTWAIT)
        except OSError:  # the front end has closed its handle, or does not read: a later packet says the same
            log.debug("status not sent", extra=fields(worker=self.name))

    def _write(self, lines: bytes) -> None:
        """Write reports to the front end. Raises LinkClosed."""
        view = memoryview(lines)
        with self._reports_lock:
            try:
                while view:
                    view = view[os.write(self._link.reports.fileno(), view) :]
            except OSError as error:
                raise LinkClosed(f"the front end has closed the link: {error.strerror}") from None

    # --- commands -----------------------------------------------------------------------------------------------------

    def _carry_commands(self) -> None:
        host = self._host
        if host is None:
            return
        lines, events = LineBuffer(), select.poll()
        for descriptor in (self._link.commands.fileno(), self._ended):
            events.register(descriptor, select.POLLIN)
        try:
            while self._ended not in dict(events.poll()):
                data = os.read(self._link.commands.fileno(), _READ_BYTES)
                if not data:
                    host.deliver(b"", (), ())  # the front end has closed the link
                    return
                for line in lines.feed(data):
                    self._carry(host, line + b"\n")
        except Exception:
            log.exception("commands cannot be carried", extra=fields(worker=self.name))
            self.kill()
        finally:
            self._link.commands.close()

    def _carry(self, host: Host, line: bytes) -> None:
        message = decode(line.removesuffix(b"\n"))
        parts: list[Part] = []
        data: list[Any] = []
        if isinstance(message, Run):
            try:
                parts, data = self._uploads.of_run(message)
            except Exception as error:  # noqa: BLE001 - the object store is full, or a file cannot be read
                log.warning("uploads cannot be sent", extra=fields(worker=self.name, job=message.job, why=repr(error)))
                full = SpoolFull("no space for the upload in the cluster's object store", retry_after_s=_FULL_RETRY_S)
                self._write(encode(Failed(message.job, full.to_wire())))
                return
        elif isinstance(message, LogLevel):
            set_level(message.level)  # of this process too: it gets no message of its own
        elif isinstance(message, Grant):
            parts = self._uploads.of_grant(message)
            data = [b""] * len(parts)
        host.deliver(line, parts, data)
