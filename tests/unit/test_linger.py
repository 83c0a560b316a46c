"""Lingering connections: dropped bytes, ends by the client, by silence, by age and by the budget."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from ovserve.front.linger import DROP_BYTES, Linger
from ovserve.settings.options import Settings

pytestmark = pytest.mark.usefixtures("leak_guard")

PATIENCE_S = 20.0


@contextmanager
def lingering(**options: Any) -> Iterator[Linger]:
    linger = Linger(Settings(**options))
    linger.start()
    try:
        yield linger
    finally:
        linger.stop(0)


@contextmanager
def connection(linger: Linger) -> Iterator[socket.socket]:
    """Yield the client's side of a connection that lingers after the answer "no"."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        theirs.sendall(b"no")
        linger.add(theirs)
        assert theirs.fileno() == -1
        ours.settimeout(PATIENCE_S)
        yield ours


def is_closed(ours: socket.socket, within_s: float) -> bool:
    """Return whether the server's side is closed within a time: a poll then reports an error or a hang-up."""
    poller = select.poll()
    poller.register(ours, 0)
    end = time.monotonic() + within_s
    while not poller.poll(0):
        if time.monotonic() > end:
            return False
        try:
            ours.send(b"x")  # a closed peer answers it with a reset
        except OSError:
            return True
        time.sleep(0.01)
    return True


def read_all(ours: socket.socket) -> bytes:
    data = b""
    while part := ours.recv(100):
        data += part
    return data


def test_client_reads_the_answer_after_a_body_of_any_length() -> None:
    with lingering() as linger, connection(linger) as ours:
        for _ in range(20):
            ours.sendall(bytes(DROP_BYTES))
        assert read_all(ours) == b"no"  # then the end-of-file: the writing side is closed


def test_connection_ends_with_the_client() -> None:
    with lingering() as linger:
        for _ in range(50):
            with connection(linger) as ours:
                ours.sendall(b"x")
        until = time.monotonic() + PATIENCE_S
        while linger.count:
            assert time.monotonic() < until
            time.sleep(0.005)


def test_client_that_has_closed_before_is_dropped() -> None:
    with lingering() as linger, socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ours.close()
        select.select([theirs], [], [], PATIENCE_S)
        linger.add(theirs)
        assert theirs.fileno() == -1


@pytest.mark.parametrize(
    "options",
    [
        {"linger_s": 0.1},
        {"body_grace_s": 0.1},  # silence
        {"linger_bytes": 10, "linger_s": 3600},
    ],
)
def test_limits_end_a_connection(options: dict[str, Any]) -> None:
    with lingering(**options) as linger, connection(linger) as ours:
        if "linger_bytes" in options:
            ours.sendall(b"x" * 11)
        time.sleep(0.2)
        assert is_closed(ours, PATIENCE_S)


def test_client_slower_than_the_minimum_rate_is_closed_and_a_faster_one_is_not() -> None:
    with lingering(min_body_bytes_per_s=1000, body_grace_s=0.5) as linger, ExitStack() as stack:
        slow, fast = (stack.enter_context(connection(linger)) for _ in range(2))
        closed_at = None
        started = time.monotonic()
        while closed_at is None and time.monotonic() - started < PATIENCE_S:
            fast.sendall(b"x" * 200)
            try:
                slow.send(b"x")
            except OSError:
                closed_at = time.monotonic()
            time.sleep(0.02)
        assert closed_at is not None
        assert closed_at - started > 0.4
        fast.sendall(b"x")
        assert read_all(fast) == b"no"


def test_oldest_is_closed_beyond_the_budget() -> None:
    with lingering(linger_connections=3) as linger, ExitStack() as stack:
        clients = [stack.enter_context(connection(linger)) for _ in range(5)]
        for client in clients[:2]:
            assert is_closed(client, PATIENCE_S)
        for client in clients[2:]:
            client.sendall(b"x" * 1000)
            assert read_all(client) == b"no"
        assert linger.count == 3


def test_stop_lets_a_client_finish_that_is_still_sending_and_closes_the_others() -> None:
    with lingering() as linger, connection(linger) as ours, connection(linger) as silent:
        started = time.monotonic()
        stopper = threading.Thread(target=linger.stop, args=(PATIENCE_S,))
        stopper.start()
        for _ in range(20):
            ours.sendall(b"x" * 1000)
            time.sleep(0.05)
        assert is_closed(silent, PATIENCE_S)
        assert read_all(ours) == b"no"
        ours.close()
        stopper.join(PATIENCE_S)
        assert time.monotonic() - started < PATIENCE_S
        assert not stopper.is_alive()


def test_connection_added_after_the_stop_is_closed() -> None:
    with lingering() as linger:
        linger.stop(0)
        with connection(linger) as ours:
            assert read_all(ours) == b"no"
