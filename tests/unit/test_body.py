"""Bodies over a real connection: exactly the content, within the limits on size and rate."""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
import time
from typing import Any

import pytest

from ovserve.errors import ApiError, ClientGone, ContentTooLarge, MalformedRequest, RequestTimeout, SpoolFull
from ovserve.front.body import Body
from ovserve.front.http1.head import Head, HeadParser
from ovserve.front.transport import Transport
from ovserve.settings.options import Settings
from tests.sockets import connected_pair, sending


def head_of(framing: str) -> Head:
    head = HeadParser(Settings()).parse(f"POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n".encode())
    assert head is not None
    return head


CHUNKED = head_of("Transfer-Encoding: chunked")


def length(count: int) -> Head:
    return head_of(f"Content-Length: {count}")


def chunked(content: bytes, size: int) -> bytes:
    pieces = (content[start : start + size] for start in range(0, len(content), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-A: b\r\n\r\n"


def read(body: Body, view_size: int) -> bytes:
    view, content = memoryview(bytearray(view_size)), b""
    while count := body.readinto(view):
        content += view[:count]
    return content


@pytest.mark.parametrize("framing", ["length", "chunks of 1", "chunks of 100", "chunks of 30000", "one chunk"])
@pytest.mark.parametrize("view_size", [1000, 65536])
def test_content_is_received_and_the_following_bytes_are_left(framing: str, view_size: int) -> None:
    generator = random.Random(f"{framing} {view_size}")
    content = generator.randbytes(3000 if framing == "chunks of 1" else 200_000)
    sizes = {"chunks of 1": 1, "chunks of 100": 100, "chunks of 30000": 30000, "one chunk": len(content)}
    data = (chunked(content, sizes[framing]) if framing in sizes else content) + b"GET /next"
    for piece_size in (len(data), 10_007, 1_003):
        pieces = [data[start : start + piece_size] for start in range(0, len(data), piece_size)]
        with connected_pair() as (ours, theirs), sending(ours, pieces):
            transport = Transport(theirs, 5)
            first = transport.receive(5)
            transport.unread(first, 0)
            body = Body(transport, CHUNKED if framing in sizes else length(len(content)), Settings())
            assert body.expected == (None if framing in sizes else len(content))
            assert not body.is_complete
            assert read(body, view_size) == content
            assert body.is_complete
            assert body.received == len(content)
            assert body.readinto(memoryview(bytearray(1))) == 0
            rest = transport.take_pending()
            while len(rest) < len(b"GET /next"):
                rest += transport.receive(5)
            assert rest == b"GET /next"


def test_body_without_content_is_complete_at_once() -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        body = Body(transport, length(0), Settings(), lambda: pytest.fail("no wait is needed"))
        assert body.is_complete
        assert read(body, 10) == b""
        ours.sendall(b"0\r\n\r\n")
        body = Body(transport, CHUNKED, Settings())
        assert not body.is_complete
        body.discard()
        assert body.is_complete


def test_before_wait_is_called_once_and_only_before_a_wait() -> None:
    for head, data in ((length(10), b"x" * 10), (CHUNKED, chunked(b"x" * 10, 3))):
        with connected_pair() as (ours, theirs):
            calls: list[int] = []
            body = Body(
                Transport(theirs, 5),
                head,
                Settings(),
                lambda calls=calls, ours=ours, data=data: (calls.append(1), ours.sendall(data)),
            )
            assert calls == []
            assert read(body, 4) == b"x" * 10
            assert calls == [1]
        with connected_pair() as (_, theirs):
            transport = Transport(theirs, 5)
            transport.unread(data, 0)
            assert read(Body(transport, head, Settings(), lambda: pytest.fail("no wait is needed")), 4) == b"x" * 10


def test_body_limit_applies_to_both_framings() -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        Body(transport, length(100), Settings(max_body_bytes=100)).check_size()
        with pytest.raises(ContentTooLarge):
            Body(transport, length(101), Settings(max_body_bytes=100)).check_size()
        ours.sendall(b"60\r\n" + b"x" * 96 + b"\r\n5\r\n")
        body = Body(transport, CHUNKED, Settings(max_body_bytes=100))
        with pytest.raises(ContentTooLarge):
            read(body, 10)


@pytest.mark.parametrize(
    ("head", "data"), [(length(10), b"x" * 9), (CHUNKED, b"a\r\nx"), (CHUNKED, b"a"), (CHUNKED, b"0\r\n")]
)
def test_client_that_closes_in_mid_body_raises_client_gone(head: Head, data: bytes) -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        body = Body(Transport(theirs, 5), head, Settings())
        with pytest.raises(ClientGone):
            read(body, 100)
        assert not body.is_complete


@pytest.mark.parametrize(("rate", "is_fast_enough"), [(0.0, True), (1000.0, False)])
def test_required_rate_above_the_minimum_replaces_it(rate: float, is_fast_enough: bool) -> None:
    pieces = (time.sleep(0.02) or b"x" for _ in range(20))  # 50 bytes a second
    with connected_pair() as (ours, theirs), sending(ours, pieces):
        limits = Settings(body_grace_s=0.1, min_body_bytes_per_s=20)
        body = Body(Transport(theirs, 5), length(20), limits, required_rate=lambda: rate)
        if is_fast_enough:
            assert read(body, 100) == b"x" * 20
        else:
            with pytest.raises(RequestTimeout):
                read(body, 100)


def test_request_that_was_ended_stops_receiving() -> None:
    def check() -> None:
        if ended.is_set():
            raise SpoolFull("ended", retry_after_s=2)

    ended = threading.Event()
    with connected_pair() as (ours, theirs):
        ours.sendall(b"x" * 5)
        body = Body(Transport(theirs, 5), length(10), Settings(), check_ended=check)
        assert body.readinto(memoryview(bytearray(5))) == 5
        ended.set()
        with pytest.raises(SpoolFull):
            body.readinto(memoryview(bytearray(5)))


def test_malformed_chunks_are_rejected() -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(b"3\r\nabcd")
        with pytest.raises(MalformedRequest):
            read(Body(Transport(theirs, 5), CHUNKED, Settings()), 100)


def dribble(head: Head, pieces: list[bytes], pause_s: float, **limits: Any) -> bytes | type[ApiError]:
    """Read a body of which one piece arrives after each pause; return the content, or the class of the error."""

    def slowly() -> Any:
        for piece in pieces:
            time.sleep(pause_s)  # the pace is what is tested
            yield piece

    with connected_pair() as (ours, theirs), sending(ours, slowly()):
        try:
            return read(Body(Transport(theirs, 5), head, Settings(**limits)), 1000)
        except RequestTimeout as error:
            return type(error)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_minimum_rate_applies_after_the_grace_period(is_chunked: bool) -> None:
    content = b"x" * 20
    head = CHUNKED if is_chunked else length(20)
    pieces = [b"1\r\nx\r\n"] * 20 + [b"0\r\n\r\n"] if is_chunked else [b"x"] * 20
    # 20 bytes in 0.4 s: 50 bytes a second.
    assert dribble(head, pieces, 0.02, body_grace_s=0.1, min_body_bytes_per_s=1000) is RequestTimeout
    assert dribble(head, pieces, 0.02, body_grace_s=10, min_body_bytes_per_s=1000) == content
    assert dribble(head, pieces, 0.02, body_grace_s=2, min_body_bytes_per_s=10) == content


def test_silence_is_limited_without_a_minimum_rate() -> None:
    assert dribble(length(2), [b"x", b"x"], 0.4, body_grace_s=0.1, min_body_bytes_per_s=0) is RequestTimeout
    assert dribble(length(2), [b"x", b"x"], 0.05, body_grace_s=5, min_body_bytes_per_s=0) == b"xx"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_fast_start_does_not_allow_a_long_silence(is_chunked: bool) -> None:
    """Without a cap, a megabyte at a minimum of 1000 bytes a second would allow a quarter of an hour of silence."""
    start = b"x" * 1_000_000
    data = b"%x\r\n%b\r\n" % (len(start), start) if is_chunked else start
    with connected_pair() as (ours, theirs), sending(ours, [data]):
        head = CHUNKED if is_chunked else length(2_000_000)
        body = Body(Transport(theirs, 5), head, Settings(body_grace_s=0.2, min_body_bytes_per_s=1000))
        started = time.monotonic()
        with pytest.raises(RequestTimeout, match="1000000 bytes"):
            read(body, 65536)
        assert time.monotonic() - started < 10


def test_pauses_of_the_server_do_not_count_against_the_client() -> None:
    with connected_pair() as (ours, theirs):
        body = Body(Transport(theirs, 5), length(4), Settings(body_grace_s=0.3, min_body_bytes_per_s=1))
        view = memoryview(bytearray(2))
        ours.sendall(b"ab")
        assert body.readinto(view) == 2
        time.sleep(0.4)  # the server was busy elsewhere
        with sending(ours, (time.sleep(0.05) or b"cd" for _ in range(1))):
            assert body.readinto(view) == 2


def test_content_is_received_into_the_given_views_only() -> None:
    content = os.urandom(50_000)
    target = bytearray(60_000)
    for data, head in ((content, length(50_000)), (chunked(content, 7000), CHUNKED)):
        with connected_pair() as (ours, theirs), sending(ours, [data]):
            body, filled = Body(Transport(theirs, 5), head, Settings()), 0
            for size in itertools.cycle((1, 10_000, 333)):
                with memoryview(target)[filled : filled + size] as view:
                    count = body.readinto(view)
                filled += count
                if not count:
                    break
        assert target == content + bytes(10_000)
