"""The listening socket: it takes its port or says why not, gives each connection a place, and ends in order."""

from __future__ import annotations

import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from ovserve.errors import StartupError
from ovserve.front import listener as listener_module
from ovserve.front.handler import Connection
from ovserve.front.listener import Listener
from ovserve.settings.options import Settings
from ovserve.wire.local.spool import Spool
from tests.rawclient import RawClient
from tests.toyapi import ToyApi, serving

HEALTH = b"GET /health HTTP/1.1\r\nHost: a.test\r\n\r\n"
ECHO = b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n"

pytestmark = pytest.mark.usefixtures("leak_guard")


@contextmanager
def listening(folder: Path, settings: Settings) -> Iterator[Listener]:
    """A listener that is not started."""
    api, spool = ToyApi(), Spool(folder, 1_000_000)
    try:
        listener = Listener(settings, api, spool)
        try:
            yield listener
        finally:
            listener.stop(0)
    finally:
        api.close()
        spool.close()


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for what a thread does after its client has its answer."""
    until = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_it_is_the_standard_library_s_threading_server() -> None:
    assert issubclass(Listener, ThreadingHTTPServer)


def test_an_occupied_port_is_named_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"^cannot listen on 127.0.0.1 port {port}: Address already in use$"):
            listening(tmp_path, Settings(port=port)).__enter__()


def test_an_address_of_another_machine_is_named_too(tmp_path: Path) -> None:
    for host in ("192.0.2.1", "ä" * 70):  # the other is too long for a name
        with pytest.raises(StartupError, match=rf"^cannot listen on {host} port 0: "):
            listening(tmp_path, Settings(host=host, port=0)).__enter__()


def test_the_port_is_taken_when_it_is_made_and_served_when_it_is_started(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener, RawClient(listener.port) as client:
        client.send(HEALTH)
        assert not client.has_answer(0.05)
        listener.start()
        assert client.read_response().status == 200


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_it_listens_on_ipv6(tmp_path: Path, host: str) -> None:
    with listening(tmp_path, Settings(host=host, port=0)) as listener:
        assert listener.host == "::1"
        listener.start()
        with socket.create_connection(("::1", listener.port), 10) as connection:
            connection.sendall(HEALTH)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_peer_that_vanished_is_looked_after(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener, RawClient(listener.port):
        select.select([listener.socket], [], [], 10)
        with listener.socket.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 120


def test_it_knows_how_much_is_going_on() -> None:
    with serving() as (listener, api):
        assert (listener.open_connections, listener.active_exchanges) == (0, 0)
        with RawClient(listener.port) as idle, RawClient(listener.port) as busy:
            idle.send(HEALTH).read_response()
            busy.send(WAIT)
            while api.seen.get(timeout=10) != "/wait":
                pass
            eventually(lambda: (listener.open_connections, listener.active_exchanges) == (2, 1))
            api.release()
            busy.read_response()
        eventually(lambda: (listener.open_connections, listener.active_exchanges) == (0, 0))


# --- the end ------------------------------------------------------------------------------------------------------------


def test_idle_connections_end_at_once_and_exchanges_in_flight_are_waited_for() -> None:
    with serving() as (listener, api), RawClient(listener.port) as idle, RawClient(listener.port) as busy:
        idle.send(HEALTH).read_response()
        busy.send(WAIT)
        while api.seen.get(timeout=10) != "/wait":
            pass
        stopping = threading.Thread(target=listener.stop, args=(30,))
        stopping.start()
        assert idle.read_rest() == b""
        with pytest.raises(ConnectionError):
            RawClient(listener.port)
        assert stopping.is_alive()
        api.release()
        response = busy.read_response()
        assert (response.status, response.fields["connection"]) == (200, "close")
        assert busy.read_rest() == b""
        stopping.join(10)
        assert not stopping.is_alive()


def test_who_was_not_accepted_yet_is_still_answered(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener:
        listener.start()
        listener.shutdown()  # as if the accept thread had no time any more
        with RawClient(listener.port) as client:
            client.send(HEALTH)
            listener.stop(10)
            answer = client.read_response()
            assert answer.status == 200
            assert answer.fields["connection"] == "close"


def test_what_outlives_the_grace_is_cut() -> None:
    with serving() as (listener, api):
        with RawClient(listener.port) as busy, RawClient(listener.port) as sending, RawClient(listener.port) as reading:
            busy.send(WAIT)
            sending.send(
                b"POST /echo HTTP/1.1\r\nHost: a.test\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            reading.send(b"GET /large?size=1000000&count=50 HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert {api.seen.get(timeout=10) for _ in range(3)} == {"/wait", "/echo", "/large"}
            started = time.monotonic()
            listener.stop(0.05)
            assert time.monotonic() - started < 15
            assert api.gone.get(timeout=10) == "/wait"
            assert busy.read_rest() == b""
            assert sending.read_rest() == b""
            assert len(reading.read_rest()) < 50_000_000
        assert listener.open_connections == 0


def test_stopping_twice_or_before_the_start_is_no_error(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener:
        listener.stop(0)
        listener.stop(0)


# --- more connections than places --------------------------------------------------------------------------------------


def test_beyond_the_limit_the_answer_is_503_and_health_still_answers() -> None:
    with serving(max_connections=2) as (listener, api):
        with RawClient(listener.port) as first, RawClient(listener.port) as second:
            first.send(WAIT)
            second.send(WAIT)
            assert [api.seen.get(timeout=10) for _ in range(2)] == ["/wait", "/wait"]
            for _ in range(3):
                with RawClient(listener.port) as third:
                    response = third.send(WAIT).read_response()
                    assert (response.status, response.code) == (503, "too_many_connections")
                    assert (response.fields["retry-after"], response.fields["connection"]) == ("1", "close")
                    assert third.read_rest() == b""
                with RawClient(listener.port) as third:
                    response = third.send(HEALTH, 1).read_response()
                    assert (response.status, response.json) == (200, {"live": True})
                    assert third.read_rest() == b""
            api.release(2)
            assert first.read_response().status == 200
            assert second.read_response().status == 200
        served_again(listener)


def served_again(listener: Listener) -> None:
    """A place is free again."""

    def is_served() -> bool:
        with RawClient(listener.port) as client:
            return client.send(b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n").read_response().status == 200

    eventually(is_served)


def test_the_connection_that_was_idle_longest_makes_place_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MIN_IDLE_S", 0.0)
    with serving(max_connections=3) as (listener, api), RawClient(listener.port) as busy:
        busy.send(WAIT)
        with RawClient(listener.port) as first, RawClient(listener.port) as second:
            for client in (second, first):
                client.send(HEALTH).read_response()
                time.sleep(0.1)  # nothing tells from outside that a thread waits again
            with RawClient(listener.port) as third:
                assert third.send(ECHO).read_response().status == 200
            assert second.read_rest() == b""
            assert first.send(ECHO).read_response().status == 200
        api.release()
        assert busy.read_response().status == 200


def test_who_was_answered_a_moment_ago_keeps_its_place() -> None:
    with serving(max_connections=1) as (listener, _), RawClient(listener.port) as first:
        first.send(ECHO).read_response()
        with RawClient(listener.port) as second:
            assert second.send(ECHO).read_response().status == 503
        assert first.send(ECHO).read_response().status == 200


def only_connection(listener: Listener) -> Connection:
    (connection,) = listener._connections
    return connection


def test_a_connection_that_has_begun_a_request_meanwhile_is_left_alone() -> None:
    with serving() as (listener, api), RawClient(listener.port) as client:
        client.send(HEALTH).read_response()
        connection = only_connection(listener)
        eventually(lambda: connection.idle_since > 0)
        since = connection.idle_since
        client.send(WAIT)
        while api.seen.get(timeout=10) != "/wait":
            pass
        assert not connection.close_idle(since)  # as whoever has read `idle_since` just before
        api.release()
        assert client.read_response().status == 200


def test_a_connection_whose_request_has_come_but_is_not_read_yet_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    woken, go_on = threading.Event(), threading.Event()
    wake = Connection._clear_idle

    def wake_late(connection: Connection) -> None:
        if connection.idle_since:
            woken.set()
            assert go_on.wait(10)
        wake(connection)

    monkeypatch.setattr(Connection, "_clear_idle", wake_late)
    with serving() as (listener, api), RawClient(listener.port) as client:
        client.send(HEALTH).read_response()
        connection = only_connection(listener)
        eventually(lambda: connection.idle_since > 0)
        client.send(WAIT)
        assert woken.wait(10)
        assert not connection.close_idle(connection.idle_since)
        go_on.set()
        api.release()
        assert client.read_response().status == 200


def test_accepting_goes_on_when_the_machine_has_no_thread_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (listener, _):
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "connection":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with RawClient(listener.port) as client:
                assert client.send(WAIT).read_response().status == 503
            with RawClient(listener.port) as client:
                assert client.send(HEALTH).read_response().status == 200
        served_again(listener)


def test_accepting_goes_on_when_descriptors_run_out() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as (listener, _):
        waiting = [socket.socket() for _ in range(20)]
        try:
            used = max(connection.fileno() for connection in waiting)
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
            for connection in waiting:
                connection.settimeout(10)
                connection.connect(("127.0.0.1", listener.port))
            # Those that found no descriptor are closed rather than left in the backlog for ever.
            for connection in waiting[10:]:
                assert connection.recv(1) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for connection in waiting:
                connection.close()
        served_again(listener)


def test_accepting_goes_on_when_not_even_the_reserve_can_be_had_again() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as (listener, _), socket.socket() as waiting:
        waiting.settimeout(10)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            waiting.connect(("127.0.0.1", listener.port))
            waiting.sendall(HEALTH)
            time.sleep(0.2)  # nothing can be seen while nothing can be opened
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert waiting.recv(100).startswith(b"HTTP/1.1 200 OK")
        served_again(listener)
