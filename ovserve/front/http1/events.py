"""Encoder of server-sent events (WHATWG HTML, section 9.2.6).

Every event and comment ends with a blank line: official clients drop an event at the end of a stream that lacks it.
"""

from __future__ import annotations

__all__ = ["comment", "encode_event", "event"]


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


def encode_event(kind: str, data: bytes) -> bytes:
    """Encode an event, or a comment when `kind` is empty."""
    return event(kind, data) if kind else comment(data)


def _lines(prefix: bytes, data: bytes) -> bytes:
    if b"\n" not in data and b"\r" not in data:
        return prefix + data
    # CR, LF and CRLF end a line in this format; bytes.splitlines splits at exactly these.
    return b"\n".join(prefix + line for line in data.splitlines())
