"""Tells systemd how the service stands: the sd_notify protocol over its datagram socket, without a dependency.

sd_notify(3): newline-separated assignments in one datagram to the address in NOTIFY_SOCKET, a path or, with a leading `@`, a name
in the abstract namespace. Outside systemd every function does nothing. Thread-safe: yes.
"""

from __future__ import annotations

import logging
import os
import socket
import time

__all__ = ["Watchdog", "notify", "notify_ready", "notify_reloading", "notify_status", "notify_stopping"]


STATE_TIMEOUT_S = 5.0  # for the manager to take a change of state: without READY=1 it ends a service that works

log = logging.getLogger(__name__)


def notify(*assignments: str, timeout_s: float = 0.0) -> bool:
    """Send assignments such as `READY=1` in one datagram; False when there is nobody to tell or nobody listens.

    Args:
        assignments: what to tell.
        timeout_s: how long to wait while the manager does not read and its queue of a few datagrams is full.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    message = "\n".join(assignment.replace("\n", " ") for assignment in assignments)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(timeout_s)  # a manager that does not read must not stop the service
            sender.connect(
                address
            )  # the wait for room is one for the peer's queue: without a peer there is none to wait for
            return sender.send(message.encode()) > 0
    except OSError as error:
        if timeout_s:
            log.warning("the service manager was not told: %s (%s)", message.partition("\n")[0], error)
        return False


def notify_ready(status: str) -> bool:
    """The service can answer (again); `status` is the line that `systemctl status` shows."""
    return notify("READY=1", f"STATUS={status}", timeout_s=STATE_TIMEOUT_S)


def notify_status(status: str) -> bool:
    """Change the line that `systemctl status` shows."""
    return notify(f"STATUS={status}")


def notify_reloading() -> bool:
    """A reload begins; `notify_ready` ends it. The instant tells the manager which of several reloads is meant."""
    instant = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
    return notify("RELOADING=1", instant, "STATUS=reloading", timeout_s=STATE_TIMEOUT_S)


def notify_stopping() -> bool:
    """The service goes down; jobs in flight are finished."""
    return notify("STOPPING=1", "STATUS=draining", timeout_s=STATE_TIMEOUT_S)


class Watchdog:
    """Feeds systemd's watchdog, three times in each of its intervals at most. Thread-safe: no.

    WATCHDOG_USEC is the interval; WATCHDOG_PID, where set, names the one process that is meant (sd_watchdog_enabled(3)).
    """

    def __init__(self) -> None:
        text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        meant = not pid or pid == str(os.getpid())
        self.interval_s = int(text) / 1_000_000 if meant and text.isascii() and text.isdigit() else 0.0
        self._fed_at = float("-inf")

    def feed(self) -> None:
        """Say that the service lives, if it is time to."""
        now = time.monotonic()
        if self.interval_s and now - self._fed_at >= self.interval_s / 3:
            self._fed_at = now
            notify("WATCHDOG=1")
