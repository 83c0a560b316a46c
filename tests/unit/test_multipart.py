"""Tests of the multipart parser: events, content, errors, bytes held between calls, and linear time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from ovserve.errors import BadRequest, MalformedRequest
from ovserve.front.forms.multipart import MultipartParser, PartBegin, PartData, PartEnd, check_boundary
from tests.bodies import Part, build, outcome, parse, parts_of, pieces_of

HEAD = b'Content-Disposition: form-data; name="prompt"\r\n\r\n'


def parser(boundary: str = "B0", max_parts: int = 8, max_part_head_bytes: int = 1024) -> MultipartParser:
    return MultipartParser(boundary, max_parts=max_parts, max_part_head_bytes=max_part_head_bytes)


def form(*contents: bytes) -> bytes:
    return b"".join(b"--B0\r\n" + HEAD + content + b"\r\n" for content in contents) + b"--B0--\r\n"


def only_part(body: bytes, boundary: str = "B0") -> Part:
    (part,) = parts_of(parse([body], boundary), body)
    return part


def test_events_of_a_form_in_one_piece() -> None:
    body = build([Part("prompt", b"a hat"), Part("image", b"\x89PNG", "cat.png", "image/png"), Part("empty")], "B0")
    events = parse([body], "B0")
    begin = body.index(b"a hat")
    picture = body.index(b"\x89PNG")
    empty = body.index(b'"empty"') + len(b'"empty"\r\n\r\n')
    assert events == [
        PartBegin(1, begin, "prompt", None, None, "binary"),
        PartData(begin, b"a hat"),
        PartEnd(1, begin + 5, 5),
        PartBegin(2, picture, "image", "cat.png", "image/png", "binary"),
        PartData(picture, b"\x89PNG"),
        PartEnd(2, picture + 4, 4),
        PartBegin(3, empty, "empty", None, None, "binary"),
        PartEnd(3, empty, 0),
    ]


def test_events_are_returned_as_soon_as_possible() -> None:
    push = parser()
    assert push.feed(b"--B0\r\n" + HEAD[:-1]) == []
    assert [type(event) for event in push.feed(b"\n")] == [PartBegin]
    assert push.feed(b"a\r\n--B") == [PartData(6 + len(HEAD), b"a")]
    assert [bytes(event.data) for event in push.feed(b"x") if isinstance(event, PartData)] == [b"\r\n--Bx"]
    assert push.feed(b"\r\n--B0") == [PartEnd(1, 13 + len(HEAD), 7)]
    assert push.feed(b"--") == []
    push.finish()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_buffer_type_is_accepted_and_none_is_kept(
    kind: Callable[[bytes], bytes | bytearray | memoryview],
) -> None:
    body = form(b"x" * 100_000, b"y")
    buffer = bytearray(body)
    push = parser()
    events = push.feed(kind(bytes(buffer)))
    buffer[:] = bytes(len(buffer))
    push.finish()
    assert [part.data for part in parts_of(events, body)] == [b"x" * 100_000, b"y"]


def test_a_memoryview_is_released_after_feed() -> None:
    buffer = bytearray(form(b"x" * 100_000))
    push = parser()
    with memoryview(buffer) as view:
        events = push.feed(view)
    buffer += b"the buffer can grow again"
    assert len(events) > 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"\r",
        b"\r\n--",
        b"\r\n--B",
        b"\n--B0",
        b"--B0",
        b"x--B0--",
        b"\r\r\n--B",
        b"-" * 70,
        b"\r\n\r\n" * 5,
        bytes(range(256)),
    ],
    ids=repr,
)
def test_bytes_like_a_delimiter_are_content(content: bytes) -> None:
    body = form(b"." + content + b".", content if not content.startswith(b"--B0") else b"")
    assert parts_of(parse([body], "B0"), body)[0].data == b"." + content + b"."
    assert outcome([body], "B0") == outcome(list(pieces_of(body, [1] * len(body))), "B0")


def test_preamble_padding_and_epilogue_are_dropped() -> None:
    body = b"read me\r\n--B0 \t \r\n" + HEAD + b"x\r\n--B0--\t \r\n--B0\r\nan epilogue"
    assert only_part(body).data == b"x"


@pytest.mark.parametrize("end", [b"--B0--", b"--B0--\r\n", b"--B0--  ", b"--B0--\t\r\n\r\n"])
def test_the_line_end_after_the_close_delimiter_is_optional(end: bytes) -> None:
    assert only_part(b"--B0\r\n" + HEAD + b"x\r\n" + end).data == b"x"


def test_a_form_without_parts_is_accepted() -> None:
    assert parse([b"--B0--\r\n"], "B0") == []


@pytest.mark.parametrize(
    ("boundary", "other"), [("B", "B0"), ("a b:c(d)", "a b:c(e)"), ("-" * 70, "-" * 69 + "x"), ("'()+_,-./:=?", "x")]
)
def test_every_valid_boundary_is_accepted(boundary: str, other: str) -> None:
    part = Part("prompt", b"x\r\n--" + other.encode()[: len(boundary) - 1] + b"!")
    assert only_part(build([part], boundary), boundary) == part


def test_invalid_boundaries_are_refused() -> None:
    assert check_boundary("-" * 70) == "-" * 70
    for wrong in ("", " ", "x ", "x" * 71, 'a"b', "a\r\nb", "é", "a\n"):
        with pytest.raises(MalformedRequest):
            check_boundary(wrong)


def test_an_error_has_the_part_and_the_offset() -> None:
    body = form(b"x", b"y").replace(b"y\r\n--B0", b"y\r\n--B0!")
    with pytest.raises(BadRequest) as caught:
        parser().feed(body)
    assert caught.value.message == (
        "multipart body: the boundary is followed by neither a line end nor two dashes"
        f" (part 2, byte {body.index(b'!')})"
    )


REST = HEAD + b"x\r\n--B0--"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"--B0 x\r\n" + REST, "text after the padding of a delimiter line (byte 5)"),
        (b"--B0\n" + REST, "neither a line end nor two dashes (byte 4)"),
        (b"--B0\r\n--B0\r\n" + REST, "a delimiter before the blank line that ends the head (part 1, byte 6)"),
        (b"--B0\r\nX: 1\r\n--B0\r\n" + REST, "a delimiter before the blank line that ends the head (part 1, byte 6)"),
        (b"--B0\r\n" + HEAD + b"--B0--", f"a delimiter directly follows the head (part 1, byte {6 + len(HEAD)})"),
        (
            b"--B0\r\n" + REST + b"x",
            f"the close delimiter is followed by more than blanks (part 1, byte {6 + len(REST)})",
        ),
        (b"--B0\r\nX: " + b"x" * 1100 + b"\r\n\r\n", "the head is longer than 1024 bytes (part 1, byte 6)"),
        (b"--B0\r\n" + HEAD.replace(b"C", b"c") + b"x\r\n--B0", "the body ends inside a delimiter line (part 1"),
        (b"--B0\r\n" + HEAD + b"x", "the body ends inside the content of a part: no close delimiter was found (part 1"),
        (form(*[b"x"] * 9), "more than 8 parts (byte"),
    ],
)
def test_malformed_bodies_are_refused_whole_and_in_single_bytes(body: bytes, words: str) -> None:
    limits = {"max_parts": 8, "max_part_head_bytes": 1024}
    whole = outcome([body], "B0", **limits)
    assert isinstance(whole, tuple)
    assert words in whole[1]
    assert outcome(list(pieces_of(body, [1] * len(body))), "B0", **limits) == whole


def test_content_length_of_a_part_must_match() -> None:
    body = form(b"four").replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\n", 1)
    assert only_part(body).data == b"four"
    with pytest.raises(MalformedRequest, match="the part has 4 bytes, but its Content-Length is 5"):
        parse([body.replace(b"Length: 4", b"Length: 5")], "B0")


def test_outside_of_heads_at_most_a_delimiter_is_held() -> None:
    push = parser(max_part_head_bytes=1024)
    body = form(b"\r\n--B" * 500, b"x")
    most = 0
    for piece in pieces_of(body, [1] * len(body)):
        inside_head = push.held_bytes > len(b"\r\n--B0--")
        push.feed(piece)
        most = max(most, push.held_bytes)
        assert push.held_bytes <= (len(HEAD) if inside_head else len(b"\r\n--B0--") + 1)
    assert most < len(HEAD)


def test_inside_a_head_at_most_its_limit_is_held() -> None:
    push = parser(max_part_head_bytes=300)
    push.feed(b"--B0\r\nX: ")
    for _ in range(296):
        push.feed(b"x")
        assert push.held_bytes <= 300
    with pytest.raises(MalformedRequest, match="longer than 300 bytes"):
        push.feed(b"x")


BLOCK = 1 << 18
HOSTILE: dict[str, tuple[str, Callable[[int], Iterator[bytes]]]] = {
    "delimiters that almost match": ("B0", lambda n: iter([b"--B0\r\n" + HEAD, b"\r\n--B" * (n // 5)])),
    "long delimiters that almost match": (
        "-" * 69 + "x",
        lambda n: iter([b"--" + b"-" * 69 + b"x\r\n" + HEAD, (b"\r\n" + b"-" * 71) * (n // 73)]),
    ),
    "a delimiter that repeats itself": (
        "-" * 70,
        lambda n: iter([b"--" + b"-" * 70 + b"\r\n" + HEAD, b"x" + b"-" * n]),
    ),
    "nothing but CR": ("B0", lambda n: iter([b"--B0\r\n" + HEAD, b"\r" * n])),
    "a preamble without end": ("B0", lambda n: iter([b"\r\n--B" * (n // 5)])),
    "padding without end": ("B0", lambda n: iter([b"--B0", b" \t" * (n // 2)])),
    "padding in small pieces": ("B0", lambda n: iter([b"--B0", *([b" \t"] * (n // 64))])),
    "an epilogue without end": ("B0", lambda n: iter([b"--B0--\r\n", b"\r\n--B0" * (n // 6)])),
    "almost a delimiter in small pieces": ("B0", lambda n: iter([b"--B0\r\n" + HEAD, *([b"\r\n--B"] * (n // 64))])),
    "a head in single bytes": ("B0", lambda n: iter([b"--B0\r\n", *([b"x"] * (n // 8))])),
    "CRLF in a head in single bytes": ("B0", lambda n: iter([b"--B0\r\n", *([b"X", b":", b"\r", b"\n"] * (n // 256))])),
}


def seconds(boundary: str, pieces: Iterator[bytes]) -> float:
    push = MultipartParser(boundary, max_parts=8, max_part_head_bytes=1 << 30)
    fed = [
        part for piece in pieces for part in pieces_of(piece, [1 << 16] * (len(piece) >> 16))
    ]  # in pieces as from a socket
    begun = time.thread_time()
    for piece in fed:
        push.feed(piece)
    return time.thread_time() - begun


@pytest.mark.parametrize("name", HOSTILE)
def test_time_grows_linearly_with_the_input(name: str) -> None:
    boundary, make = HOSTILE[name]
    for attempt in range(3):  # the machine may be busy; quadratic time takes 16 times as long in every attempt
        short = min(seconds(boundary, make(BLOCK << attempt)) for _ in range(3))
        long = min(seconds(boundary, make(4 * BLOCK << attempt)) for _ in range(3))
        if long <= 9 * short:
            return
    pytest.fail(f"{short * 1e3:.1f} ms, and {long * 1e3:.1f} ms for four times as much")
