"""Notify systemd of readiness, reload, stop and watchdog: the sd_notify protocol, without a dependency.

Also takes over the sockets of socket activation.

sd_notify(3): newline-separated assignments in one datagram to the address in NOTIFY_SOCKET, a path or, with a leading
`@`, a name in the abstract namespace. Outside systemd every function does nothing. Thread-safe: yes.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time

__all__ = [
    "Watchdog",
    "inherited_sockets",
    "notify",
    "notify_ready",
    "notify_reloading",
    "notify_status",
    "notify_stopping",
]


STATE_TIMEOUT_S = 5.0  # to deliver a change of state: without READY=1 systemd ends a working service

FIRST_INHERITED = 3  # descriptor of the first socket that systemd passes

log = logging.getLogger(__name__)


def inherited_sockets() -> list[tuple[str, socket.socket]]:
    """Return the listening sockets that the service manager has opened, each with its name; none outside one.

    sd_listen_fds(3): LISTEN_FDS descriptors from 3 on, for the process LISTEN_PID, named by LISTEN_FDNAMES. The
    variables are removed: a second call, and child processes, find nothing.
    """
    count = os.environ.pop("LISTEN_FDS", "")
    pid = os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    found = []
    for index in range(int(count)):
        taken = socket.socket(fileno=FIRST_INHERITED + index)
        os.set_inheritable(taken.fileno(), False)
        if taken.type != socket.SOCK_STREAM or not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, f"descriptor {taken.fileno()} from LISTEN_FDS is not a listening socket")
        found.append((names[index] if index < len(names) else "", taken))
    return found


def notify(*assignments: str, timeout_s: float = 0.0) -> bool:
    """Send assignments such as `READY=1` in one datagram; return False without a manager or on error.

    Args:
        assignments: the assignments.
        timeout_s: time to wait while the manager's queue of a few datagrams is full.
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
            sender.connect(address)  # unconnected sends would not wait for space in the peer's queue
            return sender.send(message.encode()) > 0
    except OSError as error:
        if timeout_s:
            log.warning("systemd was not notified of %s: %s", message.partition("\n")[0], error)
        return False


def notify_ready(status: str) -> bool:
    """Report that the service is ready; `status` is the line that `systemctl status` shows."""
    return notify("READY=1", f"STATUS={status}", timeout_s=STATE_TIMEOUT_S)


def notify_status(status: str) -> bool:
    """Change the line that `systemctl status` shows."""
    return notify(f"STATUS={status}")


def notify_reloading() -> bool:
    """Report that a reload begins; `notify_ready` ends it. The instant identifies the reload."""
    instant = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
    return notify("RELOADING=1", instant, "STATUS=reloading", timeout_s=STATE_TIMEOUT_S)


def notify_stopping() -> bool:
    """Report that the service is stopping; jobs in flight are finished."""
    return notify("STOPPING=1", "STATUS=draining", timeout_s=STATE_TIMEOUT_S)


class Watchdog:
    """Feed systemd's watchdog, at most three times in each interval. Thread-safe: no.

    WATCHDOG_USEC is the interval; WATCHDOG_PID, where set, is the process that must feed it (sd_watchdog_enabled(3)).
    """

    def __init__(self) -> None:
        text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        is_ours = not pid or pid == str(os.getpid())
        self.interval_s = int(text) / 1_000_000 if is_ours and text.isascii() and text.isdigit() else 0.0
        self._fed_at = float("-inf")

    def feed(self) -> None:
        """Notify the watchdog if a third of the interval has passed."""
        now = time.monotonic()
        if self.interval_s and now - self._fed_at >= self.interval_s / 3:
            self._fed_at = now
            notify("WATCHDOG=1")
