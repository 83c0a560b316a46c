"""Encoder of response heads: status line and field lines.

One `Responses` serves all threads of a listener; the field lines that never change are encoded once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from http import HTTPStatus

from ovserve.errors import ApiError, MalformedRequest, TooManyConnections, Unauthorized
from ovserve.front.http1.origins import OriginRule
from ovserve.settings.options import Settings

__all__ = ["CONTINUE", "JSON_TYPE", "NO_CONTENT", "Responses", "error_content", "error_fields", "reason_phrase"]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON_TYPE = "application/json"
NO_CONTENT = frozenset({204, 304})  # such a response has no body: RFC 9112 section 6.3
# Fields that a script of another origin may read, in addition to those that the Fetch standard always allows.
EXPOSED_FIELDS = "x-request-id, retry-after, x-should-retry, openai-processing-ms, x-ovserve-ignored"

_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {
    413: "Content Too Large",  # RFC 9110 section 15.5; Python 3.11 has the phrases of RFC 7231
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
REASON_BYTES = 200  # of a reason phrase: a line in a dialog or a log
_reason = re.compile(rb"[ -~]{1,%d}" % REASON_BYTES)
_PRINTABLE = bytes(byte if 0x20 <= byte <= 0x7E else ord("?") for byte in range(256))
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Responses:
    """Encodes response heads. Thread-safe: yes (the cached date is one tuple, replaced in one assignment)."""

    def __init__(self, settings: Settings) -> None:
        self._origins = OriginRule(settings)
        # nosniff: a browser must not run a picture or a text as a script, whatever its bytes are (Fetch standard).
        constant = "Server: ovserve\r\nX-Content-Type-Options: nosniff\r\n"
        constant += f"Access-Control-Expose-Headers: {EXPOSED_FIELDS}\r\n"
        # The field holds only one origin: the request's own, if it is allowed (Fetch standard, CORS protocol).
        constant += "Access-Control-Allow-Origin: *\r\n" if self._origins.allows_all else "Vary: Origin\r\n"
        self._constant = constant.encode("ascii")
        self._lines = {status: f"HTTP/1.1 {status} {phrase}\r\n".encode() for status, phrase in _PHRASES.items()}
        self._date = (0, b"")

    def head(
        self,
        status: int,
        request_id: str,
        *,
        reason: bytes = b"",
        media_type: str = "",
        framing: bytes = b"",
        connection: bytes = b"",
        headers: Mapping[str, str] | None = None,
        origin: str | None = None,
    ) -> bytes:
        """Return a response head, its blank line included.

        Args:
            status: any status code; an unknown one gets an empty phrase.
            request_id: value of x-request-id.
            reason: the reason phrase; empty for the usual one of the status code.
            media_type: value of Content-Type; empty for none.
            framing: whole field lines such as Content-Length, or empty.
            connection: the whole Connection field line, or empty.
            headers: further fields.
            origin: the request's Origin field.

        Raises:
            ValueError: a field of `headers` contains a line end, or the reason phrase is not one of `reason_phrase`.
        """
        second = int(time.time())
        date = self._date
        if date[0] != second:
            date = self._date = (second, _date_field(second))
        if reason and not _reason.fullmatch(reason):
            raise ValueError(f"a reason phrase is too long or not printable ASCII: {reason!r}")
        line = b"HTTP/1.1 %d %b\r\n" % (status, reason) if reason else self._lines.get(status)
        line = line or b"HTTP/1.1 %d \r\n" % status
        kind = f"Content-Type: {media_type}\r\n" if media_type else ""
        variable = f"{kind}x-request-id: {request_id}\r\n"
        if origin is not None and not self._origins.allows_all and self._origins.is_listed(origin):
            variable += f"Access-Control-Allow-Origin: {origin}\r\n"
        if headers:
            variable += _field_lines(headers)
        return b"".join((line, date[1], self._constant, variable.encode("latin-1"), framing, connection, b"\r\n"))

    def closing_error(self, error: ApiError, request_id: str, origin: str | None = None) -> list[bytes]:
        """Return a whole error response with `Connection: close`."""
        content = error_content(error.body())
        head = self.head(
            error.status,
            request_id,
            media_type=JSON_TYPE,
            framing=b"Content-Length: %d\r\n" % len(content),
            connection=b"Connection: close\r\n",
            headers=error_fields(error),
            origin=origin,
        )
        return [head, content]


def error_content(document: Mapping[str, object]) -> bytes:
    """Return the content of an error response, a document such as OpenAI's error object, as JSON."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


def reason_phrase(error: ApiError) -> bytes:
    """Return the reason phrase of an error response: its message, for the clients that show nothing else.

    It is one line of printable ASCII (RFC 9112 section 4 allows more): any other byte of the message becomes `?`, runs
    of spaces become one. Empty, so that the usual phrase is used, for an empty message and for the errors of which a
    client needs no details: a malformed request, a missing key, a full server, an internal error.
    """
    if error.status == 500 or isinstance(error, MalformedRequest | Unauthorized | TooManyConnections):
        return b""
    words = error.message.encode("utf-8", "replace").translate(_PRINTABLE).split()
    return b" ".join(words)[:REASON_BYTES].rstrip()


def error_fields(error: ApiError, challenge: str = "Bearer") -> dict[str, str]:
    """Return the fields of an error response that control what clients do next, such as Retry-After.

    Args:
        error: the error.
        challenge: value of WWW-Authenticate for 401.
    """
    fields = dict(error.headers)
    if error.retry_after_s is not None:
        fields["Retry-After"] = str(error.retry_after_s)
    if error.should_retry is not None:
        fields["x-should-retry"] = "true" if error.should_retry else "false"
    if error.status == 401:
        fields.setdefault("WWW-Authenticate", challenge)  # RFC 9110 section 15.5.2: at least one challenge
    return fields


def _field_lines(headers: Mapping[str, str]) -> str:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise ValueError(f"a response field contains a line end: {headers!r}")
    return lines


def _date_field(second: int) -> bytes:
    """Return the Date field line in the IMF-fixdate form, independent of the locale. RFC 9110 section 5.6.7."""
    year, month, day, hour, minute, seconds, weekday = time.gmtime(second)[:7]
    text = f"{_WEEKDAYS[weekday]}, {day:02d} {_MONTHS[month - 1]} {year} {hour:02d}:{minute:02d}:{seconds:02d} GMT"
    return f"Date: {text}\r\n".encode()
