"""Sans-I/O push parser for multipart/form-data: bytes in, PartBegin / PartData / PartEnd out.

Grammar: RFC 7578, RFC 2046 section 5.1.

    PREAMBLE ──delimiter──▶ DELIMITED ──CRLF──▶ HEAD ──blank line──▶ CONTENT ──delimiter──▶ DELIMITED
                              │    └─blank─▶ PADDED ──CRLF──▶ HEAD
                              └──"--"──▶ CLOSED ──CRLF──▶ EPILOGUE        (HEAD leads to CONTENT through OPENED)

Invariants:
- All transitions are made by the steps in `_STEPS`, one for each state. A step consumes what it can of the window and
  returns the position it reached. It either changes the state or needs more bytes.
- Any split of the input gives the same events (PartData merged) or the same error. The end of a window decides nothing.
- The bytes held between two calls are bounded: the beginning of a possible delimiter, or a part head, never content.
- Every byte is searched a bounded number of times, for any input.

A delimiter is CRLF, two dashes and the boundary. The first one may be at the very beginning, as if a CRLF preceded the
body. Bytes that begin like a delimiter but do not continue as one are refused: the boundary then occurs in the content,
which RFC 2046 section 5.1.1 forbids, and two parsers would read them differently.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from ovserve.errors import MalformedRequest, TooManyParts
from ovserve.front.forms.parthead import parse_part_head

__all__ = ["Event", "MultipartParser", "PartBegin", "PartData", "PartEnd", "check_boundary"]

WINDOW_BYTES = 64 * 1024  # searched in one step: fits the cache, and is long enough for linear time in bytes.find
SMALL_BYTES = 2048  # below 2500 bytes, bytes.find does not build a table first
VIEW_BYTES = 1024  # content shorter than this is cheaper to copy than to wrap in a memoryview


class PartBegin(NamedTuple):
    """The head of a part is complete; its content begins at `offset`. Offsets count from the start of the body."""

    number: int  # from 1
    offset: int
    name: str
    filename: str | None
    content_type: str | None  # as sent
    transfer_encoding: str  # lower case; "binary" when the part declares none


class PartData(NamedTuple):
    """A piece of the content of the current part; never empty."""

    offset: int
    data: bytes | memoryview


class PartEnd(NamedTuple):
    """The current part is complete: it has `size` bytes and ends before `offset`."""

    number: int
    offset: int
    size: int


Event = PartBegin | PartData | PartEnd


class State(enum.Enum):
    """The element that the next byte belongs to; the values are used in error messages."""

    PREAMBLE = "the preamble: no delimiter was found"
    DELIMITED = "a delimiter line"
    PADDED = "the padding of a delimiter line"
    HEAD = "the head of a part"
    OPENED = "the content of a part: no delimiter was found"
    CONTENT = "the content of a part: no close delimiter was found"
    CLOSED = "the line of the close delimiter"
    EPILOGUE = "the epilogue"

    __hash__ = object.__hash__  # members are singletons; the hash of Enum is a Python call on the hot path


_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046 section 5.1.1
# After a delimiter, the head that most clients send: the disposition, an optional type, the blank line. Not followed by
# two dashes, which may begin a delimiter. All other heads, those with escapes and non-ASCII included, are parsed by
# `parse_part_head`.
_USUAL_HEAD = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([ !#$&-\[\]-~]++)"(?:; filename="([ !#$&-\[\]-~]*+)")?+\r\n'
    rb"(?:Content-Type: ([!-~]++)\r\n)?+\r\n(?!--)"
)
_new = tuple.__new__  # the constructor of a NamedTuple is a Python call that costs as much as finding the part
_PADDING = re.compile(rb"[ \t]*")


def check_boundary(boundary: str) -> str:
    """Return the boundary unchanged. Raises MalformedRequest when it is not valid (RFC 2046 section 5.1.1)."""
    if not boundary:
        raise MalformedRequest("Content-Type: the boundary of the multipart body is missing or empty")
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedRequest(
            "Content-Type: a boundary must have 1 to 70 characters (letters, digits, blanks and '()+_,-./:=?)"
            " and no blank at its end"
        )
    return boundary


class MultipartParser:
    """Parser for one body. Thread-safe: no.

    Args:
        boundary: from the Content-Type field, unquoted.
        max_parts: the largest number of parts that is accepted.
        max_part_head_bytes: the longest head of a part that is accepted, its blank line included.

    Raises:
        MalformedRequest: from the constructor, `feed` and `finish`; the message has the part's number and the offset.
        TooManyParts: from `feed`.

    The parser must not be used after an error.
    """

    def __init__(self, boundary: str, *, max_parts: int, max_part_head_bytes: int) -> None:
        self._delimiter = b"\r\n--" + check_boundary(boundary).encode("ascii")
        self._reach = len(self._delimiter) - 1  # the longest beginning of a delimiter that a window can end with
        self._max_parts = max_parts
        self._max_head = max_part_head_bytes
        self._state = State.PREAMBLE
        self._held = bytearray(b"\r\n")  # as if a line had ended just before the body
        self._base = -2  # offset in the body of the first held byte, or else of the next byte
        self._searched = 0  # bytes of a held head that were searched for its end
        self._number = 0
        self._begun_at = 0  # offset of the content of the current part
        self._events: list[Event] = []  # of the current call to `feed`
        self._declared: int | None = None  # the Content-Length field of the current part

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the next call: at most max_part_head_bytes, or a delimiter."""
        return len(self._held)

    @property
    def offset(self) -> int:
        """The number of bytes fed so far."""
        return self._base + len(self._held)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Parse the next bytes of the body and return the events that they complete. `data` is not kept."""
        if not isinstance(data, bytes):
            return self._feed_view(data)
        events: list[Event] = []
        self._events = events
        window = data
        if self._held:
            if len(data) > WINDOW_BYTES:
                return self._feed_view(data)
            self._held += data
            if self._state is State.HEAD and not self._is_head_whole():
                return events
            window = bytes(self._held)
        position, end, state = 0, len(window), self._state
        while (position := _STEPS[state](self, window, position)) < end and self._state is not state:
            state = self._state
        self._base += position
        if position < end:
            self._held = bytearray(window[position:])
        elif self._held:
            self._held = bytearray()
        return events

    def finish(self) -> None:
        """Check that the body is complete. Raises MalformedRequest when the close delimiter is missing."""
        if self._state is State.EPILOGUE or (self._state is State.CLOSED and not self._held):
            return
        self._refuse(f"the body ends inside {self._state.value}", self.offset)

    def _feed_view(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Feed copies that fit the CPU's cache: bytes.find is several times faster than any search in a memoryview."""
        events: list[Event] = []
        with memoryview(data) as view:
            for start in range(0, len(view), WINDOW_BYTES):
                events += self.feed(bytes(view[start : start + WINDOW_BYTES]))
        return events

    def _is_head_whole(self) -> bool:
        """Return whether the held bytes have the blank line. Only new bytes are searched, to keep the time linear."""
        if self._held.find(b"\r\n\r\n", max(0, self._searched - 3)) >= 0 or self._held.startswith(b"\r\n"):
            return True
        self._searched = len(self._held)
        if self._searched >= self._max_head:
            self._refuse_head_size(self._base)
        return False

    # --- the steps: (window, position) to the position reached -------------------------------------------------

    def _skip_preamble(self, window: bytes, position: int) -> int:
        at = window.find(self._delimiter, position)
        if at < 0:
            end = len(window)
            at = window.rfind(b"\r", max(position, end - self._reach))
            return at if at >= 0 and self._delimiter.startswith(window[at:]) else end
        self._state = State.DELIMITED
        return at + len(self._delimiter)

    def _read_delimiter_end(self, window: bytes, position: int) -> int:
        position = self._read_usual_parts(window, position)
        if self._state is not State.DELIMITED:
            return position
        pair = window[position : position + 2]
        if pair == b"\r\n":
            return self._begin_head(position + 2)
        if pair == b"--":
            self._state = State.CLOSED
            return position + 2
        if pair[:1] in (b" ", b"\t"):
            self._state = State.PADDED
        elif pair not in (b"", b"\r", b"-"):
            self._refuse("the boundary is followed by neither a line end nor two dashes", self._base + position)
        return position

    def _read_usual_parts(self, window: bytes, position: int) -> int:
        """Parse parts with a usual head in one loop, with the same result as the other steps in several calls.

        Starts after a delimiter. Ends after another one, or after the head of a part that is long or incomplete. A form
        of many small fields is parsed in a third of the time.
        """
        delimiter, append, base = self._delimiter, self._events.append, self._base
        number, most, length = self._number, self._max_parts, len(self._delimiter)
        while number < most:
            match = _USUAL_HEAD.match(window, position)
            if not match or match.end() - position - 2 > self._max_head:
                break
            number += 1
            position = match.end()
            begun_at = base + position
            name, filename, kind = match.groups()
            if filename is not None:
                filename = filename.decode()
            if kind is not None:
                kind = kind.decode()
            append(_new(PartBegin, (number, begun_at, name.decode(), filename, kind, "binary")))
            end = window.find(delimiter, position, position + SMALL_BYTES)
            if end < 0:
                self._open_part(begun_at, None)
                break
            if end > position:
                append(_new(PartData, (begun_at, window[position:end])))
            append(_new(PartEnd, (number, base + end, end - position)))
            position = end + length
        self._number = number
        return position

    def _skip_padding(self, window: bytes, position: int) -> int:
        position = self._after_padding(window, position)
        pair = window[position : position + 2]
        if pair == b"\r\n":
            return self._begin_head(position + 2)
        if pair not in (b"", b"\r"):
            self._refuse("text after the padding of a delimiter line", self._base + position)
        return position

    def _read_head(self, window: bytes, position: int) -> int:
        begun_at = self._base + position
        end = position + 2
        if not window.startswith(b"\r\n", position):
            blank = window.find(b"\r\n\r\n", position)
            end = blank + 4 if blank >= 0 else len(window) + 1
        if end > len(window) or end - position > self._max_head:
            self._searched = len(window) - position
            if self._searched >= self._max_head:
                self._refuse_head_size(begun_at)
            return position
        head = window[position:end]
        if self._delimiter in head or head.startswith(self._delimiter[2:]):
            self._refuse("a delimiter before the blank line that ends the head", begun_at)
        parsed = parse_part_head(head, lambda what, at: self._refuse(what, begun_at + at))
        self._open_part(self._base + end, parsed.content_length)
        self._events.append(PartBegin(self._number, self._begun_at, *parsed[:4]))
        return end

    def _look_ahead(self, window: bytes, position: int) -> int:
        """Refuse a delimiter right after the blank line: an empty part in RFC 2046, but content for most parsers."""
        line = self._delimiter[2:]
        ahead = window[position : position + len(line)]
        if ahead == line:
            self._refuse("a delimiter directly follows the head", self._begun_at)
        if not line.startswith(ahead):
            self._state = State.CONTENT
        return position

    def _read_content(self, window: bytes, position: int) -> int:
        delimiter, base = self._delimiter, self._base
        end = found = window.find(delimiter, position)
        if found < 0:
            end = len(window)
            tail = end - self._reach
            last = window.rfind(b"\r", tail if tail > position else position)  # noqa: FURB136 - max() is slower
            if last >= 0 and delimiter.startswith(window[last:]):
                end = last  # only the last CR can begin a delimiter, which has no second CR
        if end > position:
            data: bytes | memoryview = window
            if end - position < len(window):
                data = window[position:end] if end - position < VIEW_BYTES else memoryview(window)[position:end]
            self._events.append(_new(PartData, (base + position, data)))
        if found < 0:
            return end
        size = base + end - self._begun_at
        if self._declared is not None and size != self._declared:
            self._refuse(f"the part has {size} bytes, but its Content-Length is {self._declared}", base + end)
        self._events.append(PartEnd(self._number, base + end, size))
        self._state = State.DELIMITED
        return end + len(delimiter)

    def _read_close_end(self, window: bytes, position: int) -> int:
        position = self._after_padding(window, position)
        pair = window[position : position + 2]
        if pair == b"\r\n":
            self._state = State.EPILOGUE
            return len(window)
        if pair not in (b"", b"\r"):
            self._refuse("the close delimiter is followed by more than blanks", self._base + position)
        return position

    def _skip_epilogue(self, window: bytes, _position: int) -> int:
        return len(window)

    # --- shared by the steps ------------------------------------------------------------------------------------------

    def _begin_head(self, position: int) -> int:
        self._number += 1
        if self._number > self._max_parts:
            raise TooManyParts(f"multipart body: more than {self._max_parts} parts (byte {self._base + position})")
        self._searched = 0
        self._state = State.HEAD
        return position

    def _open_part(self, begun_at: int, declared: int | None) -> None:
        self._begun_at = begun_at
        self._declared = declared
        self._state = State.OPENED

    @staticmethod
    def _after_padding(window: bytes, position: int) -> int:
        match = _PADDING.match(window, position)
        return match.end() if match else position

    def _refuse_head_size(self, at: int) -> NoReturn:
        self._refuse(f"the head is longer than {self._max_head} bytes", at)

    def _refuse(self, what: str, at: int) -> NoReturn:
        where = f"part {self._number}, byte {at}" if self._number else f"byte {at}"
        raise MalformedRequest(f"multipart body: {what} ({where})")


_Step = Callable[[MultipartParser, bytes, int], int]
_STEPS: dict[State, _Step] = {
    State.PREAMBLE: MultipartParser._skip_preamble,
    State.DELIMITED: MultipartParser._read_delimiter_end,
    State.PADDED: MultipartParser._skip_padding,
    State.HEAD: MultipartParser._read_head,
    State.OPENED: MultipartParser._look_ahead,
    State.CONTENT: MultipartParser._read_content,
    State.CLOSED: MultipartParser._read_close_end,
    State.EPILOGUE: MultipartParser._skip_epilogue,
}
