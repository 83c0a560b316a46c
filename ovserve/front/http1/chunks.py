"""The chunked transfer coding, sans-I/O: which bytes of a body are framing, and which are content (RFC 9112 section 7.1).

    SIZE ──▶ DATA ──▶ NEXT ──▶ DATA ...       SIZE, NEXT: a chunk's size and extensions; NEXT has the CRLF of the chunk before
               0 ──▶ TRAILER ──▶ DONE         (the size 0)

The decoder never sees content: it says how much there is (`remaining`), so that content can go straight to where it belongs.
Extensions and trailers are checked and dropped.
"""

from __future__ import annotations

import enum
import re

from ovserve.errors import ContentTooLarge, FieldsTooLarge, MalformedRequest
from ovserve.front.http1.headers import TOKEN
from ovserve.settings.options import Settings

__all__ = ["ChunkDecoder"]

_TEXT = r"[^\x00-\x08\x0a-\x1f\x7f]"
_EXTENSION = rf'[ \t]*+;[ \t]*+{TOKEN}(?:[ \t]*+=[ \t]*+(?:{TOKEN}|"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\{_TEXT})*"))?'
_LINE = rf"([0-9A-Fa-f]{{1,16}})(?:{_EXTENSION})*\r\n"
_size_line = re.compile(_LINE.encode())
_next_line = re.compile(rb"\r\n" + _LINE.encode())
# What can still become such a line: a wrong byte is refused when it comes, not when its line ends.
_BEGUN = rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t;][^\x00-\x08\x0a-\x1f\x7f]*)?\r?)?"
_size_begun = re.compile(_BEGUN)
_next_begun = re.compile(rb"\r?|\r\n" + _BEGUN)
_trailer_line = re.compile(f"{TOKEN}:{_TEXT}*\r\n".encode())
_bare_cr = re.compile(rb"\r(?=[^\n])")


class _State(enum.Enum):
    SIZE = "size"
    NEXT = "next"
    DATA = "data"
    TRAILER = "trailer"
    DONE = "done"


class ChunkDecoder:
    """The framing of one body. Thread-safe: no.

    Attributes:
        remaining: bytes of content before the next framing; above 0 exactly when content comes next.
        content: bytes of content announced so far.
        framing: bytes of framing so far.
    """

    def __init__(self, settings: Settings) -> None:
        self._content_limit = settings.max_body_bytes
        self._overhead_limit = settings.max_framing_overhead_bytes
        self._line_limit = settings.max_chunk_line_bytes
        self._field_limit = settings.max_field_line_bytes
        self._count_limit = settings.max_fields
        self._state = _State.SIZE
        self._line = b""  # of a line that has not ended yet
        self._fields = 0
        self.remaining = 0
        self.content = 0
        self.framing = 0

    @property
    def is_done(self) -> bool:
        """Whether the body is complete."""
        return self._state is _State.DONE

    def take(self, count: int) -> None:
        """Say that `count` bytes of content were received, at most `remaining`."""
        self.remaining -= count
        if not self.remaining:
            self._state = _State.NEXT

    def feed(self, data: bytes, start: int) -> int:
        """Read framing from data[start:]; where it ends: before content, behind the body, or len(data) when more is needed.

        Raises:
            MalformedRequest: not the chunked coding, or too much framing for its content.
            ContentTooLarge: the chunk goes beyond the largest body.
            FieldsTooLarge: the trailer section is over a limit.
        """
        while start < len(data):
            if self._state is _State.SIZE or self._state is _State.NEXT:
                start = self._feed_size(data, start)
            elif self._state is _State.TRAILER:
                start = self._feed_trailer(data, start)
            else:
                break
        return start

    def _feed_size(self, data: bytes, start: int) -> int:
        is_first = self._state is _State.SIZE
        complete = _size_line if is_first else _next_line
        if not self._line:
            match = complete.match(data, start)
            if match and match.end() - start <= self._line_limit:
                self._begin_chunk(match)
                return match.end()
        # The rare path: a line in pieces, or a wrong one.
        end = data.find(b"\n", start)
        if not is_first and len(self._line) < 2 and end >= 0 and (self._line + data[start : end + 1]) == b"\r\n":
            end = data.find(b"\n", end + 1)  # that was the end of the chunk before
        end = len(data) if end < 0 else end + 1
        self._line += data[start:end]
        match = complete.fullmatch(self._line)
        if match and len(self._line) <= self._line_limit:
            self._line = b""
            self._begin_chunk(match)
            return end
        if len(self._line) > self._line_limit:
            raise MalformedRequest(f"chunk line longer than {self._line_limit} bytes")
        begun = _size_begun if is_first else _next_begun
        if not begun.fullmatch(self._line):
            raise MalformedRequest(f"malformed chunk after {self.content} bytes of content")
        return end

    def _begin_chunk(self, match: re.Match[bytes]) -> None:
        size = int(match[1], 16)
        self._count_framing(match.end() - match.start())
        if self.content + size > self._content_limit:
            raise ContentTooLarge(f"the body is larger than {self._content_limit} bytes")
        self.content += size
        self.remaining = size
        self._state = _State.DATA if size else _State.TRAILER

    def _feed_trailer(self, data: bytes, start: int) -> int:
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end + 1
        self._line += data[start:end]
        if _bare_cr.search(self._line, max(0, len(self._line) - (end - start) - 1)):
            raise MalformedRequest("trailer section: CR without LF")
        if len(self._line) > self._field_limit + 2:
            raise FieldsTooLarge(f"a trailer field is longer than {self._field_limit} bytes")
        if not self._line.endswith(b"\n"):
            return end
        line, self._line = self._line, b""
        self._count_framing(len(line))
        if line == b"\r\n":
            self._state = _State.DONE
            return end
        self._fields += 1
        if self._fields > self._count_limit:
            raise FieldsTooLarge(f"more than {self._count_limit} trailer fields")
        if not _trailer_line.fullmatch(line):
            raise MalformedRequest("trailer section: malformed field line")
        return end

    def _count_framing(self, count: int) -> None:
        """A body in one-byte chunks costs minutes of interpreter time: framing may not outweigh content for long."""
        self.framing += count
        if self.framing > self.content + self._overhead_limit:
            raise MalformedRequest("the chunks are too small: framing outweighs content")
