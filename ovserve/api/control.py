"""Loading and unloading models for an operator: the interface to the fleet, and the routes' work."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Protocol

from ovserve.api.exchange import Exchange, JsonReply
from ovserve.api.replies import json_reply
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import ModelStatus
from ovserve.errors import InvalidValue, ModelFailed, NotReady

__all__ = ["FleetControl", "MemoryOf", "NoFleet", "load_reply", "seconds_of", "unload_reply", "wait_until"]

WAIT_S = 10.0  # for a load or an unload, if the request does not say
MAX_WAIT_S = 3600.0
RETRY_S = 60
_POLL_S = 0.05


class MemoryOf(Protocol):
    """Memory of one model in bytes: of all its workers now, and what one of them is expected to take."""

    @property
    def used_bytes(self) -> int:
        """Measured memory of all its workers."""

    @property
    def worker_bytes(self) -> int:
        """Memory that one worker is expected to take."""


class FleetControl(Protocol):
    """What the API asks of the fleet. Thread-safe."""

    def load(self, name: str, keep_alive_s: float | None) -> None:
        """Load a model without a request; None: it stays as its options say."""

    def unload(self, name: str) -> None:
        """Unload a model when its running jobs have ended; the next request loads it again."""

    def memory(self) -> Mapping[str, MemoryOf]:
        """Return the memory of each model, by name."""


class NoFleet:
    """A fleet without workers, for an API that is not connected to one."""

    def load(self, name: str, keep_alive_s: float | None) -> None:
        """Do nothing."""

    def unload(self, name: str) -> None:
        """Do nothing."""

    def memory(self) -> Mapping[str, MemoryOf]:
        """Return nothing."""
        return {}


def seconds_of(exchange: Exchange, name: str, default: float, low: float, high: float) -> float:
    """Return a number of seconds from the query. Raises InvalidValue."""
    text = exchange.query.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InvalidValue(
            f"{name} is {text[:40]!r}; expected a number of seconds from {low:g} to {high:g}.", param=name
        )
    return value


def wait_until(exchange: Exchange, is_so: Callable[[], bool], wait_s: float) -> bool:
    """Wait until a condition holds that no descriptor signals; return whether it does. Raises ClientGone."""
    deadline = Deadline.after(wait_s)
    never = os.eventfd(0, os.EFD_CLOEXEC)  # `wait` also notices that the client has gone
    try:
        while not is_so():
            if deadline.is_expired():
                return False
            exchange.wait(never, Deadline.after(min(_POLL_S, deadline.remaining())))
        return True
    finally:
        os.close(never)


def load_reply(exchange: Exchange, name: str, fleet: FleetControl, status: Callable[[], ModelStatus]) -> JsonReply:
    """Load a model and wait for it: 200 when it is ready, 202 while it still loads.

    Raises:
        ModelFailed: it cannot be loaded.
        NotReady: there is no room for it.
        InvalidValue: the query is wrong.
        ClientGone: the client has gone; the load goes on.
    """
    wait_s = seconds_of(exchange, "wait_s", WAIT_S, 0, MAX_WAIT_S)
    keep_alive_s = seconds_of(exchange, "keep_alive", math.nan, -1, 1e9) if "keep_alive" in exchange.query else None
    fleet.load(name, keep_alive_s)
    wait_until(exchange, lambda: status().state in ("ready", "failed") or bool(status().refusal), wait_s)
    now = status()
    if now.failed:
        raise ModelFailed(f"Model {name!r} could not be loaded: {now.reason.removeprefix('failed: ')}.")
    if now.refusal:
        raise NotReady(f"Model {name!r} cannot be loaded: {now.refusal}.", retry_after_s=RETRY_S)
    return _state_reply(now, is_done=now.state == "ready")


def unload_reply(exchange: Exchange, name: str, fleet: FleetControl, status: Callable[[], ModelStatus]) -> JsonReply:
    """Unload a model and wait until its workers have exited: 200 when they have, 202 while jobs still run.

    A request that comes meanwhile loads it again. Raises InvalidValue and ClientGone.
    """
    wait_s = seconds_of(exchange, "wait_s", WAIT_S, 0, MAX_WAIT_S)
    fleet.unload(name)
    is_done = wait_until(exchange, lambda: status().state == "unloaded", wait_s)
    return _state_reply(status(), is_done=is_done)


def _state_reply(status: ModelStatus, *, is_done: bool) -> JsonReply:
    document = {
        "id": status.name,
        "state": status.state,
        "waits_for": status.waits_for,
        "workers": status.workers,
        "running": status.running,
        "queued": status.queued,
    }
    return json_reply(document, 200 if is_done else 202)
