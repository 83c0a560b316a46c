"""Chunk decoder: content round-trips whatever the chunks and the split, and limits are exact to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovserve.errors import ApiError, ContentTooLarge, FieldsTooLarge, MalformedRequest
from ovserve.front.http1.chunks import ChunkDecoder
from ovserve.settings.options import Settings

DOCUMENTED = (MalformedRequest, ContentTooLarge, FieldsTooLarge)
SMALL = Settings(
    max_body_bytes=64, max_chunk_line_bytes=32, max_field_line_bytes=64, max_fields=2, max_framing_overhead_bytes=1024
)


def decode(data: bytes, cuts: list[int], limits: Settings) -> tuple[bytes, bytes | None]:
    """Decode data in pieces that end at `cuts`; return the content and the bytes after the body, None if incomplete."""
    decoder, content, start = ChunkDecoder(limits), b"", 0
    for end in sorted({*(cut for cut in cuts if 0 < cut < len(data)), len(data)}):
        piece, position = data[start:end], 0
        while position < len(piece) and not decoder.is_done:
            if decoder.remaining:
                taken = piece[position : position + decoder.remaining]
                decoder.take(len(taken))
                content += taken
                position += len(taken)
            else:
                position = decoder.feed(piece, position)
        if decoder.is_done:
            return content, data[start + position :]
        start = end
    return content, None


def outcome(data: bytes, cuts: list[int], limits: Settings) -> object:
    try:
        return decode(data, cuts, limits)
    except DOCUMENTED as error:
        assert isinstance(error, ApiError)
        return type(error)


sizes = st.lists(st.integers(1, 40), max_size=6)
extensions = st.sampled_from([b"", b"", b";a", b" ; a=b", b';a="b;\\"c"', b";a;b;c"])
trailers = st.lists(st.sampled_from([b"X-A: b\r\n", b"X-B:\r\n"]), max_size=2)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Generate a chunked body and its content."""
    data = content = b""
    for size in draw(sizes):
        piece = draw(st.binary(min_size=size, max_size=size) | st.just(b"\r\n0\r\n\r\n"[:size].ljust(size, b"\r")))
        zeros = b"0" * draw(st.integers(0, 3))
        data += zeros + b"%x" % size + draw(extensions) + b"\r\n" + piece + b"\r\n"
        content += piece
    return data + b"0" + draw(extensions) + b"\r\n" + b"".join(draw(trailers)) + b"\r\n", content


cutting = st.lists(st.integers(1, 300), max_size=10)


@settings(deadline=None)
@given(bodies(), st.binary(max_size=20), cutting)
def test_content_round_trips_whatever_the_chunks_and_the_split(
    body: tuple[bytes, bytes], following: bytes, cuts: list[int]
) -> None:
    data, content = body
    for ends in ([], cuts, list(range(len(data)))):
        assert decode(data + following, ends, Settings()) == (content, following)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                b"1",
                b"f",
                b"10",
                b"0",
                b"\r",
                b"\n",
                b"\r\n",
                b"\r\n",
                b";",
                b"a=b",
                b" ",
                b'"',
                b":",
                b"X",
                b"\x00",
                b"x" * 20,
            ]
        ),
        max_size=30,
    ),
    cutting,
)
def test_result_does_not_depend_on_the_split(parts: list[bytes], cuts: list[int]) -> None:
    for data in (b"".join(parts), b"5\r\nhello" + b"".join(parts), b"5\r\nhello\r\n0\r\n" + b"".join(parts)):
        whole = outcome(data, [], SMALL)
        assert outcome(data, cuts, SMALL) == whole
        assert outcome(data, list(range(len(data))), SMALL) == whole


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_a_body_or_a_documented_error(data: bytes) -> None:
    outcome(data, [], SMALL)
    outcome(b"1\r\nx\r\n0\r\n" + data, [], SMALL)


def test_wrong_byte_is_rejected_when_it_arrives() -> None:
    for wrong in (b"g", b"\n", b"-", b"7\rx", b"7;\x00", b"7\r\n1234567x", b"7\r\n1234567\rx", b"7\r\n1234567\r\ng"):
        assert outcome(wrong[:-1], [], Settings()) == (b"1234567" if len(wrong) > 5 else b"", None)
        assert outcome(wrong, [], Settings()) is MalformedRequest


def test_content_limit_is_exact() -> None:
    for sizes, is_accepted in (([64], True), ([65], False), ([40, 24], True), ([40, 25], False)):
        data = b"".join(b"%x\r\n%b\r\n" % (size, b"x" * size) for size in sizes) + b"0\r\n\r\n"
        assert outcome(data, [], SMALL) == ((b"x" * 64, b"") if is_accepted else ContentTooLarge)


def test_chunk_line_limit_is_exact() -> None:
    for length, is_accepted in ((32, True), (33, False)):
        line = b"5;" + b"a" * (length - 4) + b"\r\n"
        assert len(line) == length
        for cuts in ([], list(range(100))):
            found = outcome(line + b"hello\r\n0\r\n\r\n", cuts, SMALL)
            assert found == ((b"hello", b"") if is_accepted else MalformedRequest)


def test_trailer_limits_are_exact() -> None:
    for length, number, is_accepted in ((64, 2, True), (65, 1, False), (10, 3, False)):
        field = b"X-A: " + b"b" * (length - 5) + b"\r\n"
        for cuts in ([], list(range(300))):
            found = outcome(b"0\r\n" + field * number + b"\r\n", cuts, SMALL)
            assert found == ((b"", b"") if is_accepted else FieldsTooLarge)


@pytest.mark.parametrize("position", range(62, 70))
def test_error_of_a_trailer_does_not_depend_on_the_split(position: int) -> None:
    """A CR without LF near the length limit: the first of both errors decides."""
    data = b"0\r\na:" + b"x" * (position - 2) + b"\rx" + b"y" * 40
    kinds = set()
    for step in (1, 7, len(data)):
        decoder = ChunkDecoder(SMALL)
        with pytest.raises((MalformedRequest, FieldsTooLarge)) as raised:
            _ = [decoder.feed(data[start : start + step], 0) for start in range(0, len(data), step)]
        kinds.add(type(raised.value))
    assert kinds == {MalformedRequest if position <= 65 else FieldsTooLarge}


def test_framing_overhead_limit_is_exact() -> None:
    limits = Settings(max_framing_overhead_bytes=1024)
    accepted = 0
    for count in range(200, 300):
        data = b"1\r\nx" + b"\r\n1\r\nx" * (count - 1) + b"\r\n0\r\n\r\n"
        framing = len(data) - count
        is_accepted = framing - count <= 1024
        accepted += is_accepted
        assert outcome(data, [], limits) == ((b"x" * count, b"") if is_accepted else MalformedRequest)
    assert 0 < accepted < 100


def test_one_megabyte_in_small_chunks_is_accepted() -> None:
    data = b"400\r\n" + b"x" * 1024 + b"\r\n"
    content, rest = decode(data * 1024 + b"0\r\n\r\n", [], Settings())
    assert (len(content), rest) == (1024 * 1024, b"")
