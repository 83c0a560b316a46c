"""Hundreds of slow, silent and vanishing clients: each occupies its own thread only, and no other client waits."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ovserve.front.listener import Listener
from tests.rawclient import RawClient
from tests.toyapi import serving

CROWD = 200
HEALTH = b"GET /health HTTP/1.1\r\nHost: a.test\r\n\r\n"
UPLOAD = b"POST /echo HTTP/1.1\r\nHost: a.test\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

# A check takes about a millisecond. The bounds allow for a machine with two busy cores; they catch a server that makes
# one client wait for another, which takes seconds.
MEDIAN_BOUND_S = 0.25
WORST_BOUND_S = 2.0

pytestmark = pytest.mark.usefixtures("leak_guard")


def check_health(port: int, times: int = 30) -> None:
    """Check health on new connections, and the time of the answers against the bounds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        with RawClient(port) as client:
            assert client.send(HEALTH).read_response().status == 200
        taken.append(time.perf_counter() - started)
    assert statistics.median(taken) < MEDIAN_BOUND_S, taken
    assert max(taken) < WORST_BOUND_S, taken


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def dribbling(clients: list[RawClient], byte: bytes) -> Iterator[None]:
    """Send one byte at a time on each connection while the block runs."""
    ending = threading.Event()

    def dribble() -> None:
        while not ending.wait(0.05):
            for client in clients:
                client.send(byte)

    thread = threading.Thread(target=dribble, name="dribble")
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def crowd(stack: ExitStack, listener: Listener, data: bytes, number: int = CROWD) -> list[RawClient]:
    """Open connections that send the data, and wait until each has a thread."""
    clients = [stack.enter_context(RawClient(listener.port)).send(data) for _ in range(number)]
    eventually(lambda: listener.open_connections >= number)
    return clients


def test_slow_heads_delay_no_other_client() -> None:
    with ExitStack() as stack:
        listener, _ = stack.enter_context(serving(head_timeout_s=2))
        clients = crowd(stack, listener, b"GET /health HTTP/1.1\r\nX-")
        with dribbling(clients, b"a"):
            check_health(listener.port)
            for client in clients:
                assert client.read_response().status == 408
        eventually(lambda: listener.open_connections == 0)


def test_slow_bodies_delay_no_other_client() -> None:
    with ExitStack() as stack:
        listener, _ = stack.enter_context(serving(body_grace_s=2, linger_s=0.2))
        clients = crowd(stack, listener, UPLOAD + b"Content-Length: 100000\r\n\r\n" + PART)
        with dribbling(clients, b"a"):
            check_health(listener.port)
            for client in clients:
                assert client.read_response().status == 408
        eventually(lambda: listener.open_connections == 0)


def test_slow_clients_at_the_connection_limit_do_not_keep_health_out() -> None:
    with ExitStack() as stack:
        listener, _ = stack.enter_context(serving(max_connections=CROWD))
        crowd(stack, listener, UPLOAD + b"Content-Length: 100000\r\n\r\n" + PART)
        check_health(listener.port)
        with RawClient(listener.port) as client:
            response = client.send(b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n").read_response()
            assert (response.status, response.code) == (503, "too_many_connections")


def test_clients_that_do_not_read_delay_no_other_client() -> None:
    with ExitStack() as stack:
        listener, _ = stack.enter_context(serving(write_timeout_s=2))
        # Fewer than CROWD: the kernel buffers megabytes for each of them.
        crowd(stack, listener, b"GET /large?size=1000000&count=10 HTTP/1.1\r\nHost: a.test\r\n\r\n", 20)
        check_health(listener.port)
        eventually(lambda: listener.open_connections == 0)


STAGES = {
    "connected": b"",
    "in the request line": b"POST /ec",
    "in the fields": UPLOAD,
    "before the body": UPLOAD + b"Content-Length: 100000\r\n\r\n",
    "waiting for 100": UPLOAD + b"Content-Length: 100000\r\nExpect: 100-continue\r\n\r\n",
    "in a part's head": UPLOAD + b"Content-Length: 100000\r\n\r\n" + PART[:30],
    "in a part": UPLOAD + b"Content-Length: 100000\r\n\r\n" + PART + b"x" * 50_000,
    "in the last delimiter": UPLOAD + b"Content-Length: 100\r\n\r\n" + PART + b"x" * 20 + b"\r\n--b",
    "in a chunk's size": UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n1" % (len(PART), PART),
    "in a chunk": UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b" % (len(PART) + 9, PART),
    "in the trailers": UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nX-A" % (len(PART), PART),
    "while the route works": b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "in an event stream": b"GET /stream?do=3.wait HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "while the answer is written": b"GET /large?size=1000000&count=20 HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "between requests": HEALTH,
}


@pytest.mark.parametrize("leave", ["close", "abandon", "half_close"])
def test_clients_that_leave_at_any_stage_do_not_leak(leave: str) -> None:
    with ExitStack() as stack:
        listener, api = stack.enter_context(serving(head_timeout_s=2, body_grace_s=2, write_timeout_s=2))
        for data in STAGES.values():
            for wait_for_route in (False, True):
                client = stack.enter_context(RawClient(listener.port))
                client.send(data)
                if wait_for_route and b"\r\n\r\n" in data:
                    api.seen.get(timeout=10)
                getattr(client, leave)()
        # A half-closed client gets its answer, if any; the threads, segments and descriptors of all clients are freed.
        eventually(lambda: listener.open_connections == 0)
        check_health(listener.port, times=3)


def test_abandoned_upload_leaves_no_spool_files(tmp_path: Path) -> None:
    with serving() as (listener, api):
        before = spool_files(listener)
        with RawClient(listener.port) as client:
            client.send(STAGES["in a part"])
            assert api.seen.get(timeout=10) == "/echo"
            eventually(lambda: len(spool_files(listener)) > len(before))
            client.abandon()
        eventually(lambda: spool_files(listener) == before)


def spool_files(listener: Listener) -> set[str]:
    return set(os.listdir(listener.spool.directory))


def test_half_closed_client_gets_its_answer() -> None:
    with serving() as (listener, _), RawClient(listener.port) as client:
        client.send(HEALTH + b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n").half_close()
        assert client.read_response().status == 200
        assert client.read_response().status == 200
        assert client.read_rest() == b""


def test_valid_request_succeeds_after_malformed_and_abandoned_ones() -> None:
    inputs = [
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n" + b"a" * 100_000,
        UPLOAD + b"Content-Length: -1\r\n\r\n",
        *STAGES.values(),
    ]
    with serving(linger_s=0.1) as (listener, api):
        for data in inputs * 5:
            with RawClient(listener.port) as client:
                client.send(data)
        api.release(1)
        check_health(listener.port)
