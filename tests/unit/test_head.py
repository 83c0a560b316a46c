"""Head parser: one result for each head, however it is split, and limits exact to the byte."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ovserve.errors import (
    ApiError,
    ContentTooLarge,
    ExpectationFailed,
    FieldsTooLarge,
    HttpVersionNotSupported,
    MalformedRequest,
    NotImplementedMethod,
    TargetTooLong,
)
from ovserve.front.http1.head import Head, HeadParser
from ovserve.settings.options import Settings

DOCUMENTED = (
    MalformedRequest,
    TargetTooLong,
    FieldsTooLarge,
    ContentTooLarge,
    ExpectationFailed,
    NotImplementedMethod,
    HttpVersionNotSupported,
)
SMALL = Settings(max_request_line_bytes=64, max_field_line_bytes=64, max_head_bytes=300, max_fields=4)


def outcome(data: bytes, cuts: list[int], settings: Settings) -> Head | tuple[type, str] | None:
    """Parse bytes that arrive in pieces ending at `cuts`; return the head, None, or an error's class and message."""
    parser = HeadParser(settings)
    for end in sorted({*(cut for cut in cuts if 0 < cut < len(data)), len(data)}):
        try:
            head = parser.parse(data[:end])
        except DOCUMENTED as error:
            return type(error), error.message
        if head is not None:
            return head
    return None


def parse(data: bytes, **settings: Any) -> Head:
    head = HeadParser(Settings(**settings)).parse(data)
    assert head is not None
    return head


def error_of(data: bytes, **settings: Any) -> ApiError:
    with pytest.raises(DOCUMENTED) as caught:
        HeadParser(Settings(**settings)).parse(data)
    assert isinstance(caught.value, ApiError)
    return caught.value


token_chars = st.sampled_from("aZ09-_!~")
names = st.text(token_chars, min_size=1, max_size=12)
values = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]) | st.just("\t"), max_size=20)
line_ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b"", b"\r\n "])
requests = st.sampled_from(
    [
        b"GET / HTTP/1.1",
        b"POST /a%20b?c=d HTTP/1.1",
        b"OPTIONS * HTTP/1.0",
        b"GET http://a.test/ HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"get / HTTP/1.1",
        b"GET /" + b"a" * 60 + b" HTTP/1.1",
        b"GET / HTTP/2.0",
        b"GET /%zz HTTP/1.1",
    ]
)
known = st.sampled_from(
    [
        b"Host: a.test",
        b"Content-Length: 5",
        b"content-length: +5",
        b"Content-Length: 99999999999999999999",
        b"Transfer-Encoding: chunked",
        b"transfer-encoding: gzip",
        b"Connection: close",
        b"Expect: 100-continue",
        b"Expect: x",
        b"X-A: b \t",
        b"X-A : b",
        b"X-A",
        b"X-A: " + b"b" * 70,
    ]
)
lines = known | st.builds(lambda name, value: f"{name}: {value}".encode("latin-1"), names, values)


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Generate heads, most of them almost well formed."""
    data = draw(st.sampled_from([b"", b"", b"", b"\r\n", b"\r", b"\n"]))
    for line in [draw(requests), *draw(st.lists(lines, max_size=6)), b""]:
        data += line + draw(line_ends)
    return data + draw(st.sampled_from([b"", b"body", b"\r\n", b"GET / HTTP/1.1\r\n\r\n"]))


@settings(deadline=None)
@given(heads() | st.binary(max_size=80), st.lists(st.integers(1, 400), max_size=8), st.booleans())
@example(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", [1, 2, 3], False)
def test_result_does_not_depend_on_the_split(data: bytes, cuts: list[int], small: bool) -> None:
    limits = SMALL if small else Settings()
    whole = outcome(data, [], limits)
    assert outcome(data, cuts, limits) == whole
    assert outcome(data, list(range(len(data))), limits) == whole


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_a_documented_error(data: bytes) -> None:
    outcome(data, [len(data) // 2], SMALL)
    outcome(b"GET / HTTP/1.1\r\n" + data + b"\r\n\r\n", [], SMALL)


@settings(deadline=None)
@given(names, st.lists(st.tuples(names, values), max_size=30), st.booleans(), st.booleans())
def test_head_round_trips(path: str, pairs: list[tuple[str, str]], padded: bool, old: bool) -> None:
    # Padded values take the slow path; both paths must give the same result.
    end = " \t\r\n" if padded else "\r\n"
    built = f"PUT /{path}?q HTTP/1.{int(not old)}\r\nHost: a.test\r\n"
    built += "".join(f"x-{name}:\t{value}{end}" for name, value in pairs) + "\r\n"
    head = parse(built.encode("latin-1") + b"GET")
    expected: dict[str, str] = {"host": "a.test"}
    for name, value in pairs:
        key, text = f"x-{name}".lower(), value.strip(" \t")
        expected[key] = f"{expected[key]}, {text}" if key in expected else text
    assert head.fields == expected
    assert (head.method, head.target, head.path, head.query) == ("PUT", f"/{path}?q", f"/{path}", "q")
    assert (head.version, head.keep_alive, head.size) == ("1.0" if old else "1.1", not old, len(built))


def test_bytes_after_a_head_are_not_parsed() -> None:
    data = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n"
    parser = HeadParser(Settings())
    first = parser.parse(data)
    assert first is not None
    second = parser.parse(data[first.size :])
    assert second is not None
    assert (first.path, second.path, second.size) == ("/a", "/b", len(data) - first.size)


def test_parser_accepts_several_heads_in_pieces() -> None:
    data = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
    parser = HeadParser(Settings())
    for _ in range(3):
        assert [parser.parse(data[:end]) for end in range(1, len(data))] == [None] * (len(data) - 1)
        head = parser.parse(data)
        assert head is not None
        assert head.size == len(data)


HOST = b"Host: a.test\r\n"


@pytest.mark.parametrize("padded", [False, True])
def test_request_line_limit_is_exact(padded: bool) -> None:
    pad = b" " if padded else b""
    for length, is_accepted in ((100, True), (101, False)):
        line = b"GET /" + b"a" * (length - 14) + b" HTTP/1.1"
        assert len(line) == length
        data = line + b"\r\nHost: a.test" + pad + b"\r\n\r\n"
        if is_accepted:
            assert parse(data, max_request_line_bytes=100).path == "/" + "a" * (length - 14)
        else:
            assert isinstance(error_of(data, max_request_line_bytes=100), TargetTooLong)


def test_field_line_limit_is_exact() -> None:
    for length, is_accepted in ((100, True), (101, False)):
        data = b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"b" * (length - 5) + b"\r\n\r\n"
        if is_accepted:
            assert len(parse(data, max_field_line_bytes=100).fields["x-a"]) == length - 5
        else:
            assert isinstance(error_of(data, max_field_line_bytes=100), FieldsTooLarge)


@pytest.mark.parametrize("padded", [False, True])
def test_field_count_limit_is_exact(padded: bool) -> None:
    pad = b" " if padded else b""
    for number, is_accepted in ((9, True), (10, False)):
        data = b"GET / HTTP/1.1\r\n" + HOST + b"".join(b"X-%d: b%b\r\n" % (i, pad) for i in range(number)) + b"\r\n"
        if is_accepted:
            assert len(parse(data, max_fields=10).fields) == 10
        else:
            assert isinstance(error_of(data, max_fields=10), FieldsTooLarge)


def test_head_size_limit_is_exact() -> None:
    data = b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"b" * 100 + b"\r\n" * 2
    assert parse(data + b"body" * 100, max_head_bytes=len(data)).size == len(data)
    assert isinstance(error_of(data, max_head_bytes=len(data) - 1), FieldsTooLarge)
    parser = HeadParser(Settings(max_head_bytes=len(data) - 1))
    assert parser.parse(data[:-1]) is None
    with pytest.raises(FieldsTooLarge):
        parser.parse(data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"X-A : b", "field line 2: space before the colon"),
        (b" X-A: b", "field line 2: folded over two lines"),
        (b"X-A", "field line 2: no colon"),
        (b"X A: b", "field line 2: malformed field name"),
        (b"X-A: \x01", "field line 2: X-A: control character in the value"),
        (b"X-A: a\rb", "field line 2: CR without LF"),
        (b"X-A: a\nb", "field line 2: LF without CR"),
    ],
)
def test_error_names_the_line_and_the_reason(line: bytes, message: str) -> None:
    error = error_of(b"GET / HTTP/1.1\r\n" + HOST + line + b"\r\n\r\n")
    assert error.message == message
    assert error.closes_connection


def test_framing_is_length_or_chunked_or_none() -> None:
    def framed(fields: bytes) -> tuple[int | None, bool, bool]:
        head = parse(b"POST / HTTP/1.1\r\n" + HOST + fields + b"\r\n")
        return head.content_length, head.is_chunked, head.expects_continue

    assert framed(b"") == (None, False, False)
    assert framed(b"Content-Length: 0\r\n") == (0, False, False)
    assert framed(b"Content-Length: 007\r\n") == (7, False, False)
    assert framed(b"Transfer-Encoding: Chunked\r\n") == (None, True, False)
    assert framed(b"Content-Length: 7\r\nExpect: 100-Continue\r\n") == (7, False, True)
    assert framed(b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n") == (None, True, True)
    assert framed(b"Content-Length: 0\r\nExpect: 100-continue\r\n") == (0, False, False)
    assert framed(b"Content-Length: 999999999999999999\r\n") == (10**18 - 1, False, False)
    assert isinstance(
        error_of(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1" + b"0" * 18 + b"\r\n\r\n"), ContentTooLarge
    )


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n" + b"X: " + b" " * 60_000,
        b"GET / HTTP/1.1\r\nX:" + b" \t" * 30_000 + b"\x01\r\n\r\n",
        b"GET /" + b"%" * 60_000,
        b"A" * 60_000,
        b"\r\n" * 30_000,
        (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 12_000)[:65_000],
    ],
)
def test_hostile_heads_in_small_pieces_take_linear_time(data: bytes) -> None:
    limits = Settings(max_request_line_bytes=2**20, max_field_line_bytes=2**20, max_head_bytes=2**20, max_fields=10_000)
    started = time.process_time()
    outcome(data, list(range(0, len(data), 16)), limits)
    assert time.process_time() - started < 5.0  # quadratic parsing takes minutes


@pytest.mark.parametrize("target", ["/", "/x", "/x?", "/x?a=b", "/x?a?b", "/%41?%42"])
def test_target_is_kept_as_received(target: str) -> None:
    data = f"GET {target} HTTP/1.1\r\nHost: a.test\r\n".encode()
    for end in (b"\r\n", b"X: 1 \r\n\r\n"):  # the plain path and the slow path
        head = HeadParser(Settings()).parse(data + end)
        assert head is not None
        assert head.target == target
