"""Response heads: the fields of each response, and no field injection."""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import time
from typing import Any

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ovserve.api.parameters.fields import EDIT
from ovserve.api.parameters.gather import gather, refuse_unknown
from ovserve.errors import (
    ApiError,
    InternalError,
    InvalidValue,
    MalformedRequest,
    MethodNotAllowed,
    QueueFull,
    TooManyConnections,
    Unauthorized,
    UnknownParameter,
    WorkerCrashed,
)
from ovserve.front.http1.response import Responses, error_content, error_fields, reason_phrase
from ovserve.settings.options import Settings
from tests.forms import FakeForm


def lines(head: bytes) -> list[str]:
    assert head.endswith(b"\r\n\r\n")
    return head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")


def test_head_has_the_common_fields() -> None:
    before = int(time.time())
    status, *found = lines(Responses(Settings()).head(200, "req_1", media_type="a/b", framing=b"Content-Length: 3\r\n"))
    fields = dict(line.split(": ", 1) for line in found)
    assert status == "HTTP/1.1 200 OK"
    assert before <= email.utils.parsedate_to_datetime(fields.pop("Date")).timestamp() <= time.time()
    assert fields.pop("Access-Control-Expose-Headers")
    assert fields == {
        "Server": "ovserve",
        "X-Content-Type-Options": "nosniff",
        "Vary": "Origin",  # so that caches store one response for each origin
        "Content-Type": "a/b",
        "x-request-id": "req_1",
        "Content-Length": "3",
    }


def test_star_allows_every_origin() -> None:
    head = lines(Responses(Settings(allowed_origins="*")).head(200, "r", origin="https://a.test"))
    assert [line for line in head if line.startswith("Access-Control-Allow")] == ["Access-Control-Allow-Origin: *"]


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:5173", True),
        ("https://a.test", True),
        ("app://notes", True),
        ("https://b.test", False),
        ("null", False),
        (None, False),
    ],
)
def test_of_the_allowed_origins_the_request_s_own_is_named(origin: str | None, is_allowed: bool) -> None:
    responses = Responses(Settings(allowed_origins="https://a.test, app://"))
    head = lines(responses.head(200, "r", origin=origin))
    assert [line for line in head if line.startswith("Access-Control-Allow")] == (
        [f"Access-Control-Allow-Origin: {origin}"] if is_allowed else []
    )
    assert "Vary: Origin" in head


def test_reason_phrases_are_those_of_rfc_9110() -> None:
    responses = Responses(Settings())
    assert lines(responses.head(413, "r"))[0] == "HTTP/1.1 413 Content Too Large"
    assert lines(responses.head(414, "r"))[0] == "HTTP/1.1 414 URI Too Long"
    assert lines(responses.head(599, "r"))[0] == "HTTP/1.1 599 "


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("n is 99; this model allows at most 10.", b"n is 99; this model allows at most 10."),
        ("  a \t\r\n  b  ", b"a ??? b"),
        ("ü€", b"?????"),
        ("x" * 300, b"x" * 200),
        ("x" * 199 + " y", b"x" * 199),
        ("", b""),
        ("   ", b""),
    ],
)
def test_reason_phrase_is_the_message_in_one_line_of_ascii(message: str, reason: bytes) -> None:
    assert reason_phrase(InvalidValue(message)) == reason


@pytest.mark.parametrize("kind", [MalformedRequest, TooManyConnections, Unauthorized, InternalError, WorkerCrashed])
def test_reason_phrase_of_some_errors_is_fixed(kind: type[ApiError]) -> None:
    assert reason_phrase(kind("a detail")) == b""


@pytest.mark.parametrize("reason", [b"a\r\nb: c", b"x" * 201, b"\t", b"\xff"])
def test_head_rejects_a_wrong_reason_phrase(reason: bytes) -> None:
    with pytest.raises(ValueError, match="reason phrase"):
        Responses(Settings()).head(400, "r", reason=reason)


class ReceivedBytes:
    """A socket for http.client that has received some bytes."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        return self._file


@given(name=st.text(st.characters(exclude_categories=[]), min_size=1, max_size=300))
@example("x\r\nSet-Cookie: a=b\r\n\r\n")
@example("\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
@example("\x85\u2028\u010a\u560d\u560a")
def test_no_field_name_can_split_a_response(name: str) -> None:
    """U+560D and U+560A become CR and LF where a server cuts characters to their low byte."""
    try:
        refuse_unknown(gather(FakeForm([(f"zz{name}", "v")]), EDIT))
    except UnknownParameter as found:
        error = found
    content = error_content(error.body())
    reason = reason_phrase(error)
    assert 1 <= len(reason) <= 200
    head = Responses(Settings()).head(400, "r", reason=reason, framing=b"Content-Length: %d\r\n" % len(content))
    connection = h11.Connection(our_role=h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head + content)
    response, data, end = (connection.next_event() for _ in range(3))
    assert isinstance(response, h11.Response)
    assert isinstance(data, h11.Data)
    assert isinstance(end, h11.EndOfMessage)
    assert (response.status_code, bytes(response.reason), bytes(data.data)) == (400, reason, content)
    assert connection.trailing_data == (b"", False)
    received = http.client.HTTPResponse(ReceivedBytes(head + content))  # type: ignore[arg-type]
    received.begin()
    assert (received.status, received.reason, received.read()) == (400, reason.decode(), content)
    own = [name.lower().decode() for name, _ in response.headers]
    assert own == [name.lower() for name, _ in received.getheaders()]
    assert set(own) <= {"date", "server", "access-control-expose-headers", "vary", "x-content-type-options",
                        "x-request-id", "content-length"}  # fmt: skip


def test_date_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    responses = Responses(Settings())
    for second in (784_111_777, 784_111_778):
        monkeypatch.setattr(time, "time", lambda second=second: second + 0.5)
        assert f"Date: {email.utils.formatdate(second, usegmt=True)}" in lines(responses.head(200, "r"))


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\n", "\r"])
def test_field_with_a_line_end_is_rejected(value: str) -> None:
    with pytest.raises(ValueError, match="line end"):
        Responses(Settings()).head(200, "r", headers={"x-a": value})


def test_error_fields_control_retries() -> None:
    assert error_fields(QueueFull("full", retry_after_s=500)) == {"Retry-After": "60", "x-should-retry": "true"}
    assert error_fields(WorkerCrashed("twice")) == {"x-should-retry": "false"}
    assert error_fields(MethodNotAllowed("no", headers={"Allow": "GET"})) == {"Allow": "GET"}
    assert error_fields(Unauthorized("no")) == {"WWW-Authenticate": "Bearer"}
    assert error_fields(Unauthorized("no"), "Basic") == {"WWW-Authenticate": "Basic"}
    content = json.loads(error_content(InvalidValue("ž \ud800", param="n").body()))
    assert content == {
        "error": {"message": "ž ?", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }


def test_closing_error_is_a_whole_response() -> None:
    head, content = Responses(Settings()).closing_error(InvalidValue("no"), "req_1")
    assert f"Content-Length: {len(content)}" in lines(head)
    assert "Connection: close" in lines(head)
