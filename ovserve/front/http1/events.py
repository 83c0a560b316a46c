"""Server-sent events out: one event or comment to the bytes of whole lines, the closing blank line always among them.

WHATWG HTML, section 9.2.6. Without its blank line an event at the end of a stream is dropped by official clients.
"""

from __future__ import annotations

__all__ = ["comment", "encode_event", "event"]


def event(kind: str, data: bytes) -> bytes:
    """One event. `kind`: one line of text; `data`: JSON, of which line ends are kept (one `data:` line for each)."""
    if "\n" in kind or "\r" in kind:
        raise ValueError("the kind of an event is one line")
    return b"event: %b\n%b\n\n" % (kind.encode(), _lines(b"data: ", data))


def comment(text: bytes) -> bytes:
    """A comment: clients pass over it, proxies and clients with a timer on silence see that the stream lives."""
    return b"%b\n\n" % _lines(b": ", text)


def encode_event(kind: str, data: bytes) -> bytes:
    """An event, or a comment when it has no kind."""
    return event(kind, data) if kind else comment(data)


def _lines(prefix: bytes, data: bytes) -> bytes:
    if b"\n" not in data and b"\r" not in data:
        return prefix + data
    # Only CR, LF and CRLF end a line here, which is what splitlines does with bytes.
    return b"\n".join(prefix + line for line in data.splitlines())
