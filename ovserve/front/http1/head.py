"""Parser of request heads, sans-I/O: request line and field lines, with every framing rule of RFC 9112.

Two paths: `_parse_plain` reads an ordinary head with two regular expressions. Any other head takes the slow path line
by line (`_parse_lines`), which accepts unusual forms and reports what is wrong. Both end in `_build_head`, which
interprets the fields.

Invariants:
- A head that two implementations could read differently is rejected.
- The result does not depend on how the bytes were split: the error reported is the first one in byte order.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

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
from ovserve.front.http1.headers import TOKEN, list_members
from ovserve.settings.options import Settings

__all__ = ["METHODS", "Head", "HeadParser"]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Fields that must not occur twice: implementations would differ in which of the two lines they use.
SINGLE_FIELDS = frozenset({"host", "content-length", "transfer-encoding", "content-type", "authorization", "api-key"})
LENGTH_DIGITS = 18  # below 2**63, and far above any limit

# RFC 3986 sections 3.3 and 3.4, and the further characters that browsers do not encode (WHATWG URL, percent-encode
# sets).
_PATH = r"/[A-Za-z0-9\-._~!$&'()*+,;=:@/%\[\]|]*"
_QUERY = r"[!$-;=?-~]*"
_HOST = r"(?:\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9\-._~]+)?\]|[A-Za-z0-9\-._~%]+)(?::[0-9]{0,5})?"
# RFC 9112 sections 3 and 5: one space between the parts, no space before the colon, and each line ends in CRLF.
# Possessive repeats (`*+`) avoid quadratic backtracking where two neighbouring patterns can both match a run of blanks.
_VALUE = r"[^\x00-\x08\x0a-\x1f\x7f]*+"
_plain_request_line = re.compile(rf"({TOKEN}) ({_PATH})(?:\?({_QUERY}))? HTTP/1\.([0-9])\r\n")
_plain_field_lines = re.compile(rf"^({TOKEN}):[ \t]*+({_VALUE})\r\n", re.MULTILINE)
_field_line = re.compile(rf"({TOKEN}):{_VALUE}")
_request_line = re.compile(r"([^ ]+) ([^ ]+) (HTTP/([0-9])\.([0-9]))")
_origin_form = re.compile(rf"({_PATH})(?:\?({_QUERY}))?")
_absolute_form = re.compile(rf"(?i:https?)://({_HOST})({_PATH})?(?:\?({_QUERY}))?")
_host = re.compile(f"(?:{_HOST})?")
_token = re.compile(TOKEN)
_bad_escape = re.compile(r"%(?![0-9A-Fa-f]{2})")
_bare_cr = re.compile(rb"\r(?=[^\n])")
_control = re.compile(r"[\x00-\x1f\x7f]")


class Head(NamedTuple):
    """A parsed request head. Immutable.

    Attributes:
        method: one of METHODS.
        target: the request target as received.
        path: path of the target, percent-decoded once; `*` for the asterisk form.
        query: query of the target, not decoded; empty when there is none.
        version: "1.0" or "1.1" (a higher minor version is read as 1.1, RFC 9110 section 2.5).
        fields: field values by lower-case name; several lines of one name are joined by `, `.
        keep_alive: whether the client lets the connection persist.
        content_length: bytes of content; None without Content-Length.
        is_chunked: whether the body has the chunked transfer coding; never together with content_length.
        expects_continue: whether the client waits for 100 (Continue) before it sends the content.
        size: bytes of the head, its blank line included.
    """

    method: str
    target: str
    path: str
    query: str
    version: str
    fields: dict[str, str]
    keep_alive: bool
    content_length: int | None
    is_chunked: bool
    expects_continue: bool
    size: int


class HeadParser:
    """Parses the heads of one connection, one after another. Thread-safe: no."""

    def __init__(self, settings: Settings) -> None:
        self._line_limit = settings.max_request_line_bytes
        self._field_limit = settings.max_field_line_bytes
        self._head_limit = settings.max_head_bytes
        self._count_limit = settings.max_fields
        # In a head this short, only the request line can be over its limit.
        self._plain_limit = min(self._field_limit, self._head_limit)
        self._reset()

    def _reset(self) -> None:
        self._lines: list[str] = []
        self._line_start = 0
        self._searched = 0

    def parse(self, data: bytes) -> Head | None:
        """Parse the head at the start of `data`. After an exception, the bytes that follow it cannot be parsed.

        Args:
            data: all bytes since the end of the last message; while the head is incomplete, each call passes the same
                bytes and more. After a complete head, the next call is for the next message.

        Returns:
            The head, or None while it is incomplete.

        Raises:
            MalformedRequest: the head breaks a rule of the grammar or of framing, or is ambiguous.
            TargetTooLong: the request line is over its limit.
            FieldsTooLarge: a field line, their number or the whole head is over its limit.
            ContentTooLarge: Content-Length has more than LENGTH_DIGITS digits.
            ExpectationFailed: Expect is not `100-continue`.
            NotImplementedMethod: the method is not one of METHODS.
            HttpVersionNotSupported: the major version is not 1.
        """
        end = data.find(b"\r\n\r\n", self._searched - 3 if self._searched > 3 else 0)
        if 0 <= end <= self._plain_limit - 4 and not self._lines:
            head = self._parse_plain(data[: end + 2].decode("latin-1"))
            if head is not None:
                self._searched = self._line_start = 0
                return head
        head = self._parse_lines(data)
        if head is not None:
            self._reset()
        return head

    def _parse_plain(self, text: str) -> Head | None:
        """Return the head if it is an ordinary one; None when it needs the slow path."""
        line = _plain_request_line.match(text)
        if line is None or line.end() - 2 > self._line_limit or " \r\n" in text or "\t\r\n" in text:
            return None
        found = _plain_field_lines.findall(text, line.end())
        # Each match is one whole line. As many matches as lines mean that every line has matched.
        if len(found) != text.count("\n") - 1 or len(found) > self._count_limit:
            return None
        fields = {name.lower(): value for name, value in found}
        if len(fields) != len(found):
            return None
        method, path, query, minor = line.groups("")
        target = text[line.start(2) : line.end() - len(" HTTP/1.1\r\n")]
        return _build_head((method, target, path, query, minor), fields, len(text) + 2)

    def _parse_lines(self, data: bytes) -> Head | None:
        """Parse line by line, from where the last call stopped; return None while the head is incomplete."""
        window = data if len(data) <= self._head_limit else data[: self._head_limit]
        lines = self._lines
        if self._line_start == 0:
            # One empty line before the request line is ignored (RFC 9112 section 2.2).
            if window == b"\r":
                return None
            if window.startswith(b"\r\n"):
                self._line_start = self._searched = 2
        while True:
            start = self._line_start
            if not lines:
                _check_first_byte(window[start : start + 1])
            newline = window.find(b"\n", self._searched)
            self._check_line(window, start, newline)
            if newline < 0:
                self._searched = len(window)
                if len(data) > self._head_limit:
                    raise FieldsTooLarge(f"the head is longer than {self._head_limit} bytes")
                return None
            self._line_start = self._searched = newline + 1
            line = window[start : newline - 1].decode("latin-1")
            if not line:
                return _combine_lines(lines, newline + 1)
            if not lines:
                _check_request_line(line)
            elif len(lines) > self._count_limit:
                raise FieldsTooLarge(f"more than {self._count_limit} field lines")
            else:
                _check_field_line(line, len(lines))
            lines.append(line)

    def _check_line(self, window: bytes, start: int, newline: int) -> None:
        """Check the length and line ends of one line, or of the part that has been received (`newline` < 0)."""
        limit = self._field_limit if self._lines else self._line_limit
        stop = len(window) if newline < 0 else newline
        bare = _bare_cr.search(window, max(start, self._searched - 1), min(stop + 1, start + limit + 2))
        where = f"field line {len(self._lines)}" if self._lines else "request line"
        if bare:
            raise MalformedRequest(f"{where}: CR without LF")
        length = stop - start
        if length > limit + 1 or (length == limit + 1 and window[stop - 1] != 0x0D):
            if self._lines:
                raise FieldsTooLarge(f"{where}: longer than {limit} bytes")
            raise TargetTooLong(f"the request line is longer than {limit} bytes")
        if newline >= 0 and (newline == start or window[newline - 1] != 0x0D):
            raise MalformedRequest(f"{where}: LF without CR")


def _check_first_byte(first: bytes) -> None:
    """Raise MalformedRequest for a byte that cannot begin a request.

    The check does not wait for the end of the line, because a TLS client waits for an answer to its ClientHello.
    """
    if first and not _token.match(first.decode("latin-1")):
        found = {b"\n": "LF without CR", b"\r": "CR"}.get(first, f"byte 0x{first[0]:02x}")
        raise MalformedRequest(f"request line: expected a method, found {found}")


def _check_request_line(line: str) -> None:
    """Check the grammar of the request line. Raises MalformedRequest, HttpVersionNotSupported, NotImplementedMethod."""
    if _control.search(line):
        raise MalformedRequest("request line: control character")
    match = _request_line.fullmatch(line)
    if not match:
        raise MalformedRequest("request line: expected `method target HTTP/1.1`, with one space between the parts")
    method, target = match[1], match[2]
    if not _token.fullmatch(method):
        raise MalformedRequest("request line: malformed method")
    if match[4] == "0":
        raise MalformedRequest(f"request line: {match[3]} is not supported; use HTTP/1.1")
    if match[4] != "1":
        raise HttpVersionNotSupported(f"{match[3]} is not supported; use HTTP/1.1 or HTTP/1.0")
    if method not in METHODS:
        raise NotImplementedMethod(f"method {method[:40]!r} is not supported")
    _split_target(method, target)


def _split_target(method: str, target: str) -> tuple[str | None, str, str]:
    """Return authority (absolute form only), path and query of a target. RFC 9112 section 3.2."""
    if target == "*" and method == "OPTIONS":
        return None, "*", ""
    if match := _origin_form.fullmatch(target):
        return None, match[1], match[2] or ""
    if match := _absolute_form.fullmatch(target):
        return match[1], match[2] or "/", match[3] or ""
    raise MalformedRequest("request line: malformed target")


def _check_field_line(line: str, number: int) -> None:
    """Raise MalformedRequest with the reason if a field line breaks the grammar of RFC 9112 section 5."""
    if _field_line.fullmatch(line):
        return
    name, colon, _value = line.partition(":")
    if line[0] in " \t":
        reason = "folded over two lines"
    elif not colon:
        reason = "no colon"
    elif name.rstrip(" \t") != name:
        reason = "space before the colon"
    elif not _token.fullmatch(name):
        reason = "malformed field name"
    else:
        reason = f"{name}: control character in the value"
    raise MalformedRequest(f"field line {number}: {reason}")


def _combine_lines(lines: list[str], size: int) -> Head:
    """Build the head from its lines, each of which has been checked."""
    match = _request_line.fullmatch(lines[0])
    if match is None:
        raise ValueError("the request line has not been checked")
    method, target = match[1], match[2]
    authority, path, query = _split_target(method, target)
    fields: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in SINGLE_FIELDS:
            raise MalformedRequest(f"field {name} is given twice")
        else:
            fields[name] = f"{fields[name]}, {value}"
    head = _build_head((method, target, path, query, match[5]), fields, size)
    if authority is not None:
        fields["host"] = authority  # RFC 9112 section 3.2.2: the target's authority replaces Host
    return head


def _build_head(line: tuple[str, str, str, str, str], fields: dict[str, str], size: int) -> Head:
    """Interpret the fields.

    Args:
        line: method, target, path, query and minor version.
        fields: field values by lower-case name.
        size: bytes of the head.

    Raises:
        ApiError: RFC 9112 requires the server to reject the head, or it is ambiguous.
    """
    method, target, path, query, minor = line
    if method not in METHODS:
        raise NotImplementedMethod(f"method {method[:40]!r} is not supported")
    if "%" in target:
        path = _decode_path(path, target)
    is_http10 = minor == "0"
    host = fields.get("host")
    if host is None:
        if not is_http10:
            raise MalformedRequest("field host is missing")
    elif not _host.fullmatch(host):
        raise MalformedRequest("field host: malformed")
    connection = fields.get("connection")
    if connection is None:
        keep_alive = not is_http10
    else:
        options = list_members(connection.lower())
        keep_alive = "close" not in options and (not is_http10 or "keep-alive" in options)
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    content_length = None
    if coding is not None:
        _check_coding(coding, length, is_http10)
    elif length is not None:
        content_length = _parse_length(length)
    expectation = fields.get("expect")
    expects_continue = False
    if expectation is not None and not is_http10:  # ignored in an HTTP/1.0 request: RFC 9110 section 10.1.1
        if expectation.lower() != "100-continue":
            raise ExpectationFailed("field expect: only 100-continue is supported")
        expects_continue = coding is not None or bool(content_length)
    version = "1.0" if is_http10 else "1.1"
    return Head(
        method,
        target,
        path,
        query,
        version,
        fields,
        keep_alive,
        content_length,
        coding is not None,
        expects_continue,
        size,
    )


def _decode_path(path: str, target: str) -> str:
    """Percent-decode the path once. Raises MalformedRequest."""
    if _bad_escape.search(target):
        raise MalformedRequest("request line: malformed percent-encoding")
    try:
        decoded = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise MalformedRequest("request line: the path is not UTF-8") from None
    if _control.search(decoded):
        raise MalformedRequest("request line: control character in the path")
    return decoded


def _check_coding(coding: str, length: str | None, is_http10: bool) -> None:
    """Raise MalformedRequest for every Transfer-Encoding other than a single `chunked`. RFC 9112 section 6.1."""
    error: ApiError | None = None
    if length is not None:
        error = MalformedRequest("both transfer-encoding and content-length are given")
    elif is_http10:
        error = MalformedRequest("transfer-encoding is not part of HTTP/1.0")
    elif coding.lower() != "chunked":
        error = MalformedRequest("field transfer-encoding: only `chunked` is supported")
    if error:
        raise error


def _parse_length(text: str) -> int:
    """Return the value of Content-Length, which must be digits only. RFC 9112 section 6.3."""
    if not (text.isascii() and text.isdigit()):
        raise MalformedRequest("field content-length: expected one whole number in digits")
    if len(text) > LENGTH_DIGITS:
        raise ContentTooLarge(f"field content-length: more than {LENGTH_DIGITS} digits")
    return int(text)
