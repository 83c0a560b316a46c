"""Server-sent events of one reply: bytes in, events out (HTML standard, section 9.2.6). Does no input or output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Event", "EventParser"]


@dataclass(slots=True)
class Event:
    """One block of the stream: its name, its data lines joined by newlines, and its comment lines."""

    name: str = "message"
    data: str = ""
    comments: list[str] = field(default_factory=list)


class EventParser:
    """Splits a stream into events. A line is buffered until it is complete.

    Args:
        max_line_bytes: longest line that is accepted.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._parts: list[bytes] = []  # of the incomplete line: joined once, because pictures are long lines
        self._length = 0
        self._event = Event()
        self._data: list[str] = []
        self._is_empty = True
        self._ended_in_return = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that are complete with `data`; lines end with LF, CR or CRLF.

        Raises:
            ValueError: a line is longer than `max_line_bytes`, or is not UTF-8.
        """
        if self._ended_in_return and data.startswith(b"\n"):
            data = data[1:]
        if data:
            self._ended_in_return = data.endswith(b"\r")
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._parts.append(line)
            whole = b"".join(self._parts)
            self._parts.clear()
            self._length = 0
            if len(whole) > self._max_line_bytes:
                raise ValueError(f"a line has more than {self._max_line_bytes} bytes")
            if (event := self._end_line(whole.decode())) is not None:
                yield event
        self._length += len(rest)
        if self._length > self._max_line_bytes:
            raise ValueError(f"a line has more than {self._max_line_bytes} bytes")
        if rest:
            self._parts.append(rest)

    def _end_line(self, line: str) -> Event | None:
        if not line:
            event, is_empty = self._event, self._is_empty
            event.data = "\n".join(self._data)
            self._event, self._data, self._is_empty = Event(), [], True
            return None if is_empty else event
        self._is_empty = False
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self._event.comments.append(value)
        elif name == "event":
            self._event.name = value
        elif name == "data":
            self._data.append(value)
        return None
