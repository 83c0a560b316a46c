"""Request bodies for tests: built from parts, decoded from captured requests, read in pieces, parsed to parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovserve.errors import ApiError
from ovserve.front.forms.multipart import Event, MultipartParser, PartBegin, PartData, PartEnd
from ovserve.front.http1.chunks import ChunkDecoder
from ovserve.settings.options import Settings
from ovserve.settings.sources import load_settings

__all__ = [
    "MemoryBody",
    "Part",
    "build",
    "content_of",
    "decode_chunks",
    "head_and_rest",
    "outcome",
    "parse",
    "parts_of",
    "pieces_of",
    "settings",
]


def settings(**options: Any) -> Settings:
    """Return settings with these options; the others have their defaults."""
    return load_settings({name: str(value) for name, value in options.items()}, {})


@dataclass(frozen=True)
class Part:
    """One part of a form, assembled from its events."""

    name: str
    data: bytes = b""
    filename: str | None = None
    content_type: str | None = None
    transfer_encoding: str = "binary"
    fields: tuple[str, ...] = field(default=(), compare=False)  # additional header lines, for `build`


def build(parts: Iterable[Part], boundary: str, *, preamble: bytes = b"", epilogue: bytes = b"\r\n") -> bytes:
    """Return a body as browsers write it: `"` as %22, CR and LF as %0D and %0A."""
    lines = [preamble + b"\r\n"] if preamble else []
    for part in parts:
        disposition = f'form-data; name="{_quoted(part.name)}"'
        if part.filename is not None:
            disposition += f'; filename="{_quoted(part.filename)}"'
        head = [f"Content-Disposition: {disposition}", *part.fields]
        if part.content_type is not None:
            head.append(f"Content-Type: {part.content_type}")
        lines.append(f"--{boundary}\r\n".encode() + "\r\n".join(head).encode() + b"\r\n\r\n" + part.data + b"\r\n")
    return b"".join(lines) + f"--{boundary}--".encode() + epilogue


def _quoted(text: str) -> str:
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def pieces_of(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Yield `data` in pieces of these sizes, then the rest in one piece."""
    at = 0
    for size in sizes:
        if at >= len(data):
            return
        yield data[at : at + size]
        at += size
    if at < len(data):
        yield data[at:]


def parse(pieces: Iterable[bytes | memoryview], boundary: str, **limits: int) -> list[Event]:
    """Return all events of a body. Raises what the parser raises."""
    parser = MultipartParser(boundary, **{"max_parts": 128, "max_part_head_bytes": 8192, **limits})
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    parser.finish()
    return events


def parts_of(events: Iterable[Event], body: bytes) -> list[Part]:
    """Return the parts that the events describe; check each offset against the body."""
    found: list[Part] = []
    begin, data = None, b""
    for event in events:
        if isinstance(event, PartBegin):
            assert begin is None
            assert event.number == len(found) + 1
            begin, data = event, b""
        elif isinstance(event, PartData):
            assert begin is not None
            assert event.data
            assert event.offset == begin.offset + len(data)
            data += bytes(event.data)
        else:
            assert isinstance(event, PartEnd)
            assert begin is not None
            assert (event.number, event.size) == (begin.number, len(data))
            assert body[begin.offset : event.offset] == data
            found.append(Part(begin.name, data, begin.filename, begin.content_type, begin.transfer_encoding))
            begin = None
    assert begin is None
    return found


def outcome(pieces: Sequence[bytes], boundary: str, **limits: int) -> list[Part] | tuple[str, str]:
    """Return the parts, or the class and message of the error: must not depend on how the body is split."""
    try:
        return parts_of(parse(pieces, boundary, **limits), b"".join(pieces))
    except ApiError as error:
        return type(error).__name__, error.message


def head_and_rest(raw: bytes) -> tuple[dict[str, str], bytes]:
    """Return the header fields of a captured request by lower-case name, and the bytes after its head."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}, rest


def decode_chunks(pieces: Iterable[bytes], options: Settings) -> bytes:
    """Return the content of a chunked body, decoded by the server's decoder. Raises what it raises."""
    decoder = ChunkDecoder(options)
    content = b""
    for piece in pieces:
        at = 0
        while at < len(piece) and not decoder.is_done:
            if decoder.remaining:
                taken = piece[at : at + decoder.remaining]
                content += taken
                decoder.take(len(taken))
                at += len(taken)
            else:
                at = decoder.feed(piece, at)
    assert decoder.is_done
    return content


def content_of(raw: bytes, sizes: Iterable[int] = ()) -> bytes:
    """Return the content of a captured request with its chunks decoded, read in pieces of these sizes."""
    fields, rest = head_and_rest(raw)
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return decode_chunks(pieces_of(rest, sizes), settings())
    return rest


class MemoryBody:
    """A body in memory, read in pieces of these sizes, then as much as requested."""

    def __init__(self, data: bytes, sizes: Iterable[int] = (), *, announced: bool = True) -> None:
        self.expected = len(data) if announced else None
        self.given = 0
        self.largest_view = 0
        self._data = data
        self._sizes = iter(sizes)

    def readinto(self, view: memoryview, /) -> int:
        """Copy the next bytes into `view` and return their number."""
        assert len(view), "a read of zero bytes"
        self.largest_view = max(self.largest_view, len(view))
        count = min(len(view), next(self._sizes, len(view)), len(self._data) - self.given)
        view[:count] = self._data[self.given : self.given + count]
        self.given += count
        return count
