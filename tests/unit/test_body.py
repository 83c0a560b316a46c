"""Bodies off a real connection: all of the content, none of what follows, within size and rate."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from typing import Any

import pytest

from ovserve.errors import ApiError, ClientGone, ContentTooLarge, MalformedRequest, RequestTimeout
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
def test_content_is_received_and_what_follows_is_left(framing: str, view_size: int) -> None:
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


def test_a_body_without_content_is_complete_at_once() -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        body = Body(transport, length(0), Settings(), lambda: pytest.fail("nothing is waited for"))
        assert body.is_complete
        assert read(body, 10) == b""
        ours.sendall(b"0\r\n\r\n")
        body = Body(transport, CHUNKED, Settings())
        assert not body.is_complete
        body.discard()
        assert body.is_complete


def test_the_client_is_told_to_go_on_once_and_only_when_it_is_waited_for() -> None:
    for head, data in ((length(10), b"x" * 10), (CHUNKED, chunked(b"x" * 10, 3))):
        with connected_pair() as (ours, theirs):
            told: list[int] = []
            body = Body(
                Transport(theirs, 5),
                head,
                Settings(),
                lambda told=told, ours=ours, data=data: (told.append(1), ours.sendall(data)),
            )
            assert told == []
            assert read(body, 4) == b"x" * 10
            assert told == [1]
        with connected_pair() as (_, theirs):
            transport = Transport(theirs, 5)
            transport.unread(data, 0)
            assert read(Body(transport, head, Settings(), lambda: pytest.fail("all of it was there")), 4) == b"x" * 10


def test_a_body_holds_to_its_limit() -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        assert Body(transport, length(100), Settings(max_body_bytes=100)).expected == 100
        with pytest.raises(ContentTooLarge):
            Body(transport, length(101), Settings(max_body_bytes=100))
        ours.sendall(b"60\r\n" + b"x" * 96 + b"\r\n5\r\n")
        body = Body(transport, CHUNKED, Settings(max_body_bytes=100))
        with pytest.raises(ContentTooLarge):
            read(body, 10)


@pytest.mark.parametrize(
    ("head", "data"), [(length(10), b"x" * 9), (CHUNKED, b"a\r\nx"), (CHUNKED, b"a"), (CHUNKED, b"0\r\n")]
)
def test_a_client_that_ends_too_early_is_gone(head: Head, data: bytes) -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        body = Body(Transport(theirs, 5), head, Settings())
        with pytest.raises(ClientGone):
            read(body, 100)
        assert not body.is_complete


def test_wrong_chunks_are_refused() -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(b"3\r\nabcd")
        with pytest.raises(MalformedRequest):
            read(Body(Transport(theirs, 5), CHUNKED, Settings()), 100)


def dribble(head: Head, pieces: list[bytes], pause_s: float, **limits: Any) -> bytes | type[ApiError]:
    """What comes of a body whose pieces come one in each pause."""

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
def test_the_least_rate_of_a_body_is_asked_for_after_the_grace(is_chunked: bool) -> None:
    content = b"x" * 20
    head = CHUNKED if is_chunked else length(20)
    pieces = [b"1\r\nx\r\n"] * 20 + [b"0\r\n\r\n"] if is_chunked else [b"x"] * 20
    # 20 bytes in 0.4 s: 50 bytes a second.
    assert dribble(head, pieces, 0.02, body_grace_s=0.1, min_body_bytes_per_s=1000) is RequestTimeout
    assert dribble(head, pieces, 0.02, body_grace_s=10, min_body_bytes_per_s=1000) == content
    assert dribble(head, pieces, 0.02, body_grace_s=2, min_body_bytes_per_s=10) == content


def test_silence_has_a_limit_where_no_rate_is_asked_for() -> None:
    assert dribble(length(2), [b"x", b"x"], 0.4, body_grace_s=0.1, min_body_bytes_per_s=0) is RequestTimeout
    assert dribble(length(2), [b"x", b"x"], 0.05, body_grace_s=5, min_body_bytes_per_s=0) == b"xx"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_quick_start_buys_no_long_silence(is_chunked: bool) -> None:
    """A megabyte at a thousand bytes a second was credit for a quarter of an hour of silence."""
    start = b"x" * 1_000_000
    data = b"%x\r\n%b\r\n" % (len(start), start) if is_chunked else start
    with connected_pair() as (ours, theirs), sending(ours, [data]):
        head = CHUNKED if is_chunked else length(2_000_000)
        body = Body(Transport(theirs, 5), head, Settings(body_grace_s=0.2, min_body_bytes_per_s=1000))
        started = time.monotonic()
        with pytest.raises(RequestTimeout, match="1000000 bytes"):
            read(body, 65536)
        assert time.monotonic() - started < 10


def test_our_own_pauses_are_not_the_client_s() -> None:
    with connected_pair() as (ours, theirs):
        body = Body(Transport(theirs, 5), length(4), Settings(body_grace_s=0.3, min_body_bytes_per_s=1))
        view = memoryview(bytearray(2))
        ours.sendall(b"ab")
        assert body.readinto(view) == 2
        time.sleep(0.4)  # the server was busy elsewhere
        with sending(ours, (time.sleep(0.05) or b"cd" for _ in range(1))):
            assert body.readinto(view) == 2


def test_content_goes_where_it_is_wanted_and_nowhere_else() -> None:
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
