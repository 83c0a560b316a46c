"""Encoder of server-sent events (WHATWG HTML, section 9.2.6).

Every event and comment ends with a blank line: official clients drop an event at the end of a stream that lacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["comment", "encode_event", "event"]

_T = TypeVar("_T")


def event(kind: str, data: bytes) -> bytes:
    """Encode an event.

    Args:
        kind: the event's type, one line of text.
        data: JSON; each of its lines becomes a `data:` line.

    Raises:
        ValueError: `kind` has more than one line.
    """
    if "\n" in kind or "\r" in kind:
        raise ValueError(f"the kind of an event must be one line: {kind!r}")
    return b"event: %b\n%b\n\n" % (kind.encode(), _lines(b"data: ", data))


def comment(text: bytes) -> bytes:
    """Encode a comment.

    Clients ignore it; it keeps proxies, and clients with a read timeout, from closing a stream without events.
    """
    return b"%b\n\n" % _lines(b": ", text)


def encode_event(kind: str, data: Sequence[bytes | _T]) -> Sequence[bytes | _T]:
    """Encode an event, or a comment when `kind` is empty.

    Args:
        kind: the event's type, one line of text.
        data: the data in one chunk, or one line in several. A chunk that is not `bytes` stays as it is.

    Raises:
        ValueError: `kind` has more than one line, or one of several chunks contains a line end.
    """
    if len(data) == 1 and isinstance(data[0], bytes):
        return [event(kind, data[0]) if kind else comment(data[0])]
    if any(isinstance(chunk, bytes) and (b"\n" in chunk or b"\r" in chunk) for chunk in data):
        raise ValueError("data in several chunks must be one line")
    return [event(kind, b"").removesuffix(b"\n\n") if kind else b": ", *data, b"\n\n"]


def _lines(prefix: bytes, data: bytes) -> bytes:
    if b"\n" not in data and b"\r" not in data:
        return prefix + data
    # CR, LF and CRLF end a line in this format; bytes.splitlines splits at exactly these.
    return b"\n".join(prefix + line for line in data.splitlines())
