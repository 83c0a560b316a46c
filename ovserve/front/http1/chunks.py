"""Decoder of the chunked transfer coding, sans-I/O (RFC 9112 section 7.1).

    SIZE ──▶ DATA ──▶ NEXT ──▶ DATA ...       SIZE, NEXT: chunk size and extensions
               0 ──▶ TRAILER ──▶ DONE         NEXT: begins with the CRLF of the chunk before; 0: a chunk of size 0

The decoder never receives content. It reports how much content comes next (`remaining`), so that the caller can receive
it directly into its target. Chunk extensions and trailer fields are checked and dropped.
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
# Prefixes of such a line: a wrong byte is rejected when it arrives, not when its line ends.
_PREFIX = rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t;][^\x00-\x08\x0a-\x1f\x7f]*)?\r?)?"
_size_prefix = re.compile(_PREFIX)
_next_prefix = re.compile(rb"\r?|\r\n" + _PREFIX)
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
        remaining: bytes of content left in the current chunk; above 0 exactly when content comes next.
        content: bytes of content in all chunks so far, the current one included.
        framing: bytes of framing so far.
    """

    def __init__(self, settings: Settings) -> None:
        self._content_limit = settings.max_body_bytes
        self._overhead_limit = settings.max_framing_overhead_bytes
        self._line_limit = settings.max_chunk_line_bytes
        self._field_limit = settings.max_field_line_bytes
        self._count_limit = settings.max_fields
        self._state = _State.SIZE
        self._line = b""  # the start of an incomplete line
        self._fields = 0
        self.remaining = 0
        self.content = 0
        self.framing = 0

    @property
    def is_done(self) -> bool:
        """Whether the body is complete."""
        return self._state is _State.DONE

    def take(self, count: int) -> None:
        """Record that `count` bytes of content have been received, at most `remaining`."""
        self.remaining -= count
        if not self.remaining:
            self._state = _State.NEXT

    def feed(self, data: bytes, start: int) -> int:
        """Parse framing in `data[start:]`.

        Returns:
            The offset where the framing ends: the start of content, the end of the body, or len(data) when more is
            needed.

        Raises:
            MalformedRequest: the framing is malformed, or there is too much of it for its content.
            ContentTooLarge: the chunk exceeds `max_body_bytes`.
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
        # Rare: an incomplete or malformed line.
        end = data.find(b"\n", start)
        if not is_first and len(self._line) < 2 and end >= 0 and (self._line + data[start : end + 1]) == b"\r\n":
            end = data.find(b"\n", end + 1)  # this one ends the previous chunk
        end = len(data) if end < 0 else end + 1
        self._line += data[start:end]
        match = complete.fullmatch(self._line)
        if match and len(self._line) <= self._line_limit:
            self._line = b""
            self._begin_chunk(match)
            return end
        if len(self._line) > self._line_limit:
            raise MalformedRequest(f"a chunk line is longer than {self._line_limit} bytes")
        prefix = _size_prefix if is_first else _next_prefix
        if not prefix.fullmatch(self._line):
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
        # The first error in the order of bytes decides, so that it does not depend on how the data was split.
        limit = self._field_limit + 2
        if _bare_cr.search(self._line, max(0, len(self._line) - (end - start) - 1), limit + 1):
            raise MalformedRequest("trailer section: CR without LF")
        if len(self._line) > limit:
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
        """Raise MalformedRequest when framing exceeds content by more than `max_framing_overhead_bytes`.

        Without the limit, a body in one-byte chunks takes minutes of interpreter time.
        """
        self.framing += count
        if self.framing > self.content + self._overhead_limit:
            raise MalformedRequest(
                f"the chunks are too small: framing exceeds content by more than {self._overhead_limit} bytes"
            )
