"""The listener: start-up errors, connection limit, eviction, exhausted resources and graceful stop."""

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
from ovserve.front import overflow as overflow_module
from ovserve.front.handler import Connection
from ovserve.front.listener import Listener
from ovserve.front.unixsocket import bind_unix
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
    """Yield a listener that is not started."""
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
    """Wait for something that a thread does after its client has received the answer."""
    until = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_listener_is_a_threading_http_server() -> None:
    assert issubclass(Listener, ThreadingHTTPServer)


def test_occupied_port_is_a_one_line_startup_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"^cannot listen on 127.0.0.1 port {port}: Address already in use$"):
            listening(tmp_path, Settings(port=port)).__enter__()


def test_unusable_host_is_a_startup_error(tmp_path: Path) -> None:
    for host in ("192.0.2.1", "ä" * 70):  # another machine's address; a name that is too long
        with pytest.raises(StartupError, match=rf"^cannot listen on {host} port 0: "):
            listening(tmp_path, Settings(host=host, port=0)).__enter__()


def test_port_is_bound_by_the_constructor_and_served_after_start(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener, RawClient(listener.port) as client:
        client.send(HEALTH)
        assert not client.has_answer(0.05)
        listener.start()
        assert client.read_response().status == 200


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_listens_on_ipv6(tmp_path: Path, host: str) -> None:
    with listening(tmp_path, Settings(host=host, port=0)) as listener:
        assert listener.host == "::1"
        listener.start()
        with socket.create_connection(("::1", listener.port), 10) as connection:
            connection.sendall(HEALTH)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_tcp_keepalive_detects_a_vanished_peer_within_two_minutes(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener, RawClient(listener.port):
        select.select([listener.socket], [], [], 10)
        with listener.socket.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 120


def test_open_connections_and_active_exchanges_are_counted() -> None:
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


# --- stop -------------------------------------------------------------------------------------------------------------


def test_stop_closes_idle_connections_at_once_and_waits_for_requests_in_flight() -> None:
    with serving() as (listener, api), RawClient(listener.port) as idle, RawClient(listener.port) as busy:
        idle.send(HEALTH).read_response()
        busy.send(WAIT)
        while api.seen.get(timeout=10) != "/wait":
            pass
        stopping = threading.Thread(target=listener.stop, args=(30,))
        stopping.start()
        assert idle.read_rest() == b""
        # A connection that becomes idle after the drain has begun ends itself, maybe before the socket is closed.
        eventually(lambda: listener.socket.fileno() < 0)
        with pytest.raises(ConnectionError):
            RawClient(listener.port)
        assert stopping.is_alive()
        api.release()
        response = busy.read_response()
        assert (response.status, response.fields["connection"]) == (200, "close")
        assert busy.read_rest() == b""
        stopping.join(10)
        assert not stopping.is_alive()


def test_stop_answers_connections_in_the_backlog(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener:
        listener.start()
        listener.shutdown()  # so that the next connection stays in the backlog
        with RawClient(listener.port) as client:
            client.send(HEALTH)
            listener.stop(10)
            answer = client.read_response()
            assert answer.status == 200
            assert answer.fields["connection"] == "close"


def test_stop_closes_the_socket_before_it_waits_for_connections_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overflow_module, "STOP_GRACE_S", 20.0)
    with serving(max_connections=1) as (listener, api), RawClient(listener.port) as busy:
        busy.send(WAIT)
        assert api.seen.get(timeout=10) == "/wait"
        with RawClient(listener.port) as beyond:
            beyond.send(HEALTH[:-2])
            stopping = threading.Thread(target=listener.stop, args=(30,))
            stopping.start()
            eventually(lambda: listener.socket.fileno() < 0)
            assert not beyond.has_answer(0)
            assert beyond.send(HEALTH[-2:]).read_response().status == 200
        api.release()
        assert busy.read_response().status == 200
        stopping.join(10)
        assert not stopping.is_alive()


def test_stop_aborts_requests_after_the_grace_period() -> None:
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


def test_stop_is_idempotent_and_needs_no_start(tmp_path: Path) -> None:
    with listening(tmp_path, Settings(port=0)) as listener:
        listener.stop(0)
        listener.stop(0)


# --- connection limit -------------------------------------------------------------------------------------------------


def test_connections_beyond_the_limit_get_503_and_health_still_answers() -> None:
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
    """Wait until a connection is below the limit and gets a thread again."""

    def is_served() -> bool:
        with RawClient(listener.port) as client:
            return client.send(b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n").read_response().status == 200

    eventually(is_served)


def test_new_connection_evicts_the_one_idle_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MIN_QUIET_S", 0.0)
    with serving(max_connections=3) as (listener, api), RawClient(listener.port) as busy:
        busy.send(WAIT)
        with RawClient(listener.port) as first, RawClient(listener.port) as second:
            for client in (second, first):
                client.send(HEALTH).read_response()
                time.sleep(0.1)  # from outside, a thread that waits again cannot be observed
            with RawClient(listener.port) as third:
                assert third.send(ECHO).read_response().status == 200
            assert second.read_rest() == b""
            assert first.send(ECHO).read_response().status == 200
        api.release()
        assert busy.read_response().status == 200


def test_recently_answered_connection_is_not_evicted() -> None:
    with serving(max_connections=1) as (listener, _), RawClient(listener.port) as first:
        first.send(ECHO).read_response()
        with RawClient(listener.port) as second:
            assert second.send(ECHO).read_response().status == 503
        assert first.send(ECHO).read_response().status == 200


def only_connection(listener: Listener) -> Connection:
    (connection,) = listener._connections
    return connection


def test_close_quiet_with_an_outdated_idle_since_does_nothing() -> None:
    with serving() as (listener, api), RawClient(listener.port) as client:
        client.send(HEALTH).read_response()
        connection = only_connection(listener)
        eventually(lambda: connection.idle_since > 0)
        since = connection.idle_since
        client.send(WAIT)
        while api.seen.get(timeout=10) != "/wait":
            pass
        assert not connection.close_quiet(since)  # like a listener that has read `idle_since` just before the request
        api.release()
        assert client.read_response().status == 200


def test_close_quiet_keeps_a_connection_with_unread_request_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    clearing, resume = threading.Event(), threading.Event()
    clear_idle = Connection._clear_idle

    def clear_late(connection: Connection) -> None:
        if connection.idle_since:
            clearing.set()
            assert resume.wait(10)
        clear_idle(connection)

    monkeypatch.setattr(Connection, "_clear_idle", clear_late)
    with serving() as (listener, api), RawClient(listener.port) as client:
        client.send(HEALTH).read_response()
        connection = only_connection(listener)
        eventually(lambda: connection.idle_since > 0)
        client.send(WAIT)
        assert clearing.wait(10)
        assert not connection.close_quiet(connection.idle_since)
        resume.set()
        api.release()
        assert client.read_response().status == 200


def test_accepting_continues_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_accepting_continues_when_descriptors_run_out(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as (listener, _):
        waiting = [socket.socket() for _ in range(20)]
        try:
            used = max(connection.fileno() for connection in waiting)
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
            for connection in waiting:
                connection.settimeout(10)
                connection.connect(("127.0.0.1", listener.port))
            # Connections without a descriptor are closed, rather than left in the backlog for ever.
            for connection in waiting[10:]:
                assert connection.recv(1) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for connection in waiting:
                connection.close()
        served_again(listener)
    lines = [record for record in caplog.records if record.getMessage().startswith("out of file descriptors")]
    reports = [record for record in caplog.records if record.getMessage().startswith("log lines suppressed")]
    assert 1 <= len(lines) <= 10  # each further connection is only counted
    assert len(lines) + sum(record.fields["number"] for record in reports) >= 10  # type: ignore[attr-defined]


def test_accepting_continues_when_no_spare_descriptor_can_be_opened() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as (listener, _), socket.socket() as waiting:
        waiting.settimeout(10)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            waiting.connect(("127.0.0.1", listener.port))
            waiting.sendall(HEALTH)
            time.sleep(0.2)  # without descriptors, the test cannot observe the listener
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert waiting.recv(100).startswith(b"HTTP/1.1 200 OK")
        served_again(listener)


def test_a_unix_socket_whose_process_does_not_accept_is_in_use(tmp_path: Path) -> None:
    """A stopped process keeps its socket, and a full backlog does not keep the start waiting."""
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as stopped, socket.socket(socket.AF_UNIX) as queued:
        stopped.bind(path)
        stopped.listen(0)
        queued.connect(path)
        with socket.socket(socket.AF_UNIX) as second, pytest.raises(OSError, match="in use"):
            bind_unix(second, path, 0o600, (-1, -1))
