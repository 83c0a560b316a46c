"""Response heads: the fields of each response, and no field injection."""

from __future__ import annotations

import email.utils
import json
import time

import pytest

from ovserve.errors import InvalidValue, MethodNotAllowed, QueueFull, Unauthorized, WorkerCrashed
from ovserve.front.http1.response import Responses, error_content, error_fields
from ovserve.settings.options import Settings


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
    content = json.loads(error_content(InvalidValue("ž \ud800", param="n")))
    assert content == {
        "error": {"message": "ž ?", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }


def test_closing_error_is_a_whole_response() -> None:
    head, content = Responses(Settings()).closing_error(InvalidValue("no"), "req_1")
    assert f"Content-Length: {len(content)}" in lines(head)
    assert "Connection: close" in lines(head)
