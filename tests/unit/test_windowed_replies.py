"""Replies that are produced while they are written: whole, bounded in memory, always closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ovserve.errors import ClientGone
from ovserve.front import transport as transport_module
from ovserve.front.listener import Listener
from ovserve.front.transport import Transport
from tests.rawclient import RawClient
from tests.sockets import connected_pair
from tests.toyapi import ToyApi, serving

SIZE, COUNT = 256 * 1024, 200
WHOLE = b"".join(bytes([65 + number % 26]) * 1000 for number in range(40))
LARGE = f"?size={SIZE}&count={COUNT}"

pytestmark = pytest.mark.usefixtures("leak_guard")


@pytest.fixture
def running() -> Iterator[tuple[Listener, ToyApi]]:
    with serving(write_timeout_s=20) as both:
        yield both


def request(target: str, method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} {target} HTTP/{version}\r\nHost: a.test\r\n\r\n".encode()


def test_reply_in_windows_arrives_whole_and_is_closed_once(running: Any) -> None:
    listener, api = running
    with RawClient(listener.port) as client:
        for target, expected in (("/windows", b"<" + WHOLE + b">"), ("/windowed-file", WHOLE)):
            response = client.send(request(target + "?size=1000&count=40")).read_response()
            assert response.content == expected
            assert response.fields["content-length"] == str(len(expected))
            assert api.closed.get(timeout=10) == target
        assert client.send(request("/health")).read_response().status == 200
    assert api.closed.empty()


def test_event_in_windows_is_one_chunk(running: Any) -> None:
    with RawClient(running[0].port) as client:
        client.send(request("/stream?do=3.windows.3&size=1000&count=40"))
        client.read_head()
        assert client.read_chunk() == b"event: piece\ndata: xxx\n\n"
        assert client.read_chunk() == b"event: piece\ndata: <" + WHOLE + b">\n\n"
        assert client.read_chunk() == b"event: piece\ndata: xxx\n\n"
        assert client.read_chunk() == b""
        old = client.send(request("/stream?do=windows&size=1000&count=40", version="1.0")).read_response()
        assert old.content == b"event: piece\ndata: <" + WHOLE + b">\n\n"


def test_head_produces_no_window_and_closes_the_reply(running: Any) -> None:
    listener, api = running
    with RawClient(listener.port) as client:
        response = client.send(request("/windows" + LARGE, "HEAD")).read_response("HEAD")
        assert response.fields["content-length"] == str(SIZE * COUNT + 2)
        assert api.closed.get(timeout=10) == "/windows"
        assert api.windows == []
        assert client.send(request("/health")).read_response().status == 200


@pytest.mark.parametrize("target", ["/windows" + LARGE, "/windowed-file" + LARGE, "/stream" + LARGE + "&do=windows"])
def test_windows_are_produced_as_the_client_reads(running: Any, target: str) -> None:
    listener, api = running
    with RawClient(listener.port, receive_buffer=65536) as client:
        client.send(request(target)).read_head()
        until_stalled(api)
        assert sum(api.windows) < 12 << 20  # what the buffers of the kernel hold, and one window; of 50 MiB
        client.abandon()
    assert api.closed.get(timeout=10) == target.partition("?")[0]


def until_stalled(api: ToyApi) -> None:
    """Wait until no window has been produced for a while: what a blocked thread does not do has no event."""
    pause, before = threading.Event(), -1
    while len(api.windows) != before:
        before = len(api.windows)
        pause.wait(0.3)


@pytest.mark.parametrize("leave", ["close", "abandon"])
@pytest.mark.parametrize("target", ["/windows" + LARGE, "/stream" + LARGE + "&do=windows"])
def test_client_that_leaves_closes_the_reply(running: Any, target: str, leave: str) -> None:
    listener, api = running
    client = RawClient(listener.port).send(request(target))
    client.read_head()
    getattr(client, leave)()
    assert api.closed.get(timeout=10) == target.partition("?")[0]
    assert len(api.windows) < COUNT


@pytest.mark.parametrize("what", ["/windows", "/windowed-file"])
def test_source_that_fails_before_the_first_byte_is_500(running: Any, what: str) -> None:
    listener, api = running
    with RawClient(listener.port) as client:
        response = client.send(request(f"{what}?size={SIZE}&count=9&fail=0")).read_response()
        assert (response.status, response.code) == (500, "internal_error")
        assert api.closed.get(timeout=10) == what
        assert client.send(request("/health")).read_response().status == 200


@pytest.mark.parametrize(("what", "fail"), [("/windows", 5), ("/windowed-file", 5), ("/stream", 5), ("/stream", 0)])
def test_source_that_fails_later_ends_the_connection(
    running: Any, what: str, fail: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener, api = running
    with RawClient(listener.port) as client:
        client.send(request(f"{what}?size={SIZE}&count=9&fail={fail}&do=windows")).read_head()
        assert len(client.read_rest()) < SIZE * 9
    assert api.closed.get(timeout=10) == what
    assert "unexpected error" in caplog.messages
    with RawClient(listener.port) as client:
        assert client.send(request("/health")).read_response().status == 200


def test_stop_closes_replies_that_are_not_read() -> None:
    with serving(write_timeout_s=60) as (listener, api), RawClient(listener.port) as client:
        client.send(request("/windows" + LARGE)).read_head()
        listener.stop(0.1)
        assert api.closed.get(timeout=10) == "/windows"


def test_batches_are_written_in_order() -> None:
    batches = [[b"%d" % number, memoryview(b"x" * 70_000)] for number in range(50)]
    expected = b"".join(bytes(buffer) for batch in batches for buffer in batch)
    with connected_pair() as (ours, theirs):
        received = bytearray()
        reader = threading.Thread(target=lambda: [received.extend(data) for data in iter(lambda: ours.recv(9999), b"")])
        reader.start()
        assert Transport(theirs, 5).send_batches(iter(batches)) == len(expected)
        theirs.shutdown(1)
        reader.join()
        assert received == expected


@pytest.mark.parametrize("number", [0, 40])
def test_error_of_a_producer_is_passed_on(number: int) -> None:
    def produce() -> Iterator[list[bytes]]:
        for _ in range(number):
            yield [bytes(1 << 20)]
        raise OSError("the source has failed")

    ended = threading.Event()
    with connected_pair() as (ours, theirs):

        def read() -> None:
            while not ended.is_set() and ours.recv(1 << 20):
                pass

        reader = threading.Thread(target=read)
        reader.start()
        with pytest.raises(OSError, match="the source has failed"):
            Transport(theirs, 5).send_batches(produce())
        ended.set()
        theirs.shutdown(1)
        reader.join()


def test_minimum_read_rate_is_that_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MIN_READ_BYTES_PER_S", 10**8)  # so that bytes in kernel buffers add no time
    ended = threading.Event()
    with connected_pair() as (ours, theirs):

        def read() -> None:  # at most 20 MB/s: no single batch takes as long as the write timeout
            while not ended.wait(0.01):
                ours.recv(200_000)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            with pytest.raises(ClientGone, match="fewer than"):
                Transport(theirs, 0.3).send_batches([bytes(1 << 20)] for _ in range(64))
        finally:
            ended.set()
            reader.join()
