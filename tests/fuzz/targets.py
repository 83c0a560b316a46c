"""Fuzz targets: one function per parser that checks its properties for any bytes. The corpus replay uses them too."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ovserve.api.parameters.imagehead import read_head
from ovserve.errors import (
    ApiError,
    BadRequest,
    ContentTooLarge,
    ExpectationFailed,
    FieldsTooLarge,
    HttpVersionNotSupported,
    ImageError,
    MalformedRequest,
    NotImplementedMethod,
    TargetTooLong,
    TooManyParts,
)
from ovserve.front.forms.form import read_form
from ovserve.front.forms.multipart import MultipartParser
from ovserve.front.http1.chunks import ChunkDecoder
from ovserve.front.http1.head import Head, HeadParser
from ovserve.front.http1.proxyheader import MAX_EXTENSION_BYTES, ProxyHeader
from ovserve.pixels.decoder import DecodeLimits, Decoder
from ovserve.pixels.images import Limits
from ovserve.wire.local.spool import Spool
from tests.bodies import MemoryBody, Part, parts_of, settings
from tests.imagefiles import encoded

__all__ = ["TARGETS"]

OPTIONS = settings(
    max_head_bytes=512,
    max_request_line_bytes=128,
    max_field_line_bytes=128,
    max_fields=8,
    max_body_bytes=4096,
    max_framing_overhead_bytes=1024,
    max_json_text_bytes=1024,
    max_text_field_bytes=512,
)
HEAD_BYTES = 128


def cut(data: bytes) -> Iterator[list[bytes]]:
    """Yield the bytes after the first in one piece, one by one, and in pieces whose size the first byte sets."""
    size = data[0] % 23 + 2 if data else 2
    body = data[1:]
    yield [body]
    yield [body[at : at + 1] for at in range(len(body))]
    yield [body[at : at + size] for at in range(0, len(body), size)]


def multipart(data: bytes) -> None:
    """Check that any split gives the same parts or the same documented error, and that held bytes are bounded."""
    outcomes = [_parse_multipart(pieces) for pieces in cut(data)]
    assert outcomes[0] == outcomes[1] == outcomes[2], outcomes


def _parse_multipart(pieces: list[bytes]) -> list[Part] | str:
    parser = MultipartParser("B0", max_parts=4, max_part_head_bytes=HEAD_BYTES)
    events = []
    try:
        for piece in pieces:
            events += parser.feed(piece)
            assert parser.held_bytes <= HEAD_BYTES
        parser.finish()
    except (MalformedRequest, TooManyParts) as error:
        return f"{type(error).__name__}: {error.message}"
    return parts_of(events, b"".join(pieces))


def framing(data: bytes) -> None:
    """Check that any split gives the same head, content and end of the content, or the same documented error."""
    outcomes = [_read_request(pieces) for pieces in cut(data)]
    assert outcomes[0] == outcomes[1] == outcomes[2], outcomes


def _read_request(pieces: list[bytes]) -> tuple[Any, ...]:
    parser = HeadParser(OPTIONS)
    received, head, used = b"", None, 0
    try:
        for used, piece in enumerate(pieces, 1):  # noqa: B007 - the rest of the pieces is read below
            received += piece
            head = parser.parse(received)
            if head:
                break
        if not head:
            return ("incomplete head",)
        assert head.size <= OPTIONS.max_head_bytes
        rest = [received[head.size :], *pieces[used:]]
        # The raw target is used only in the log: an empty query may be missing in it.
        try:
            return (head._replace(target=""), *_read_content(head, rest))
        except (MalformedRequest, FieldsTooLarge, ContentTooLarge):
            # If a chunk line has two faults, the split decides which one is reported: do not compare the message.
            return (head._replace(target=""), "rejected")
    except (
        MalformedRequest,
        TargetTooLong,
        FieldsTooLarge,
        ContentTooLarge,
        ExpectationFailed,
        NotImplementedMethod,
        HttpVersionNotSupported,
    ) as error:
        return type(error).__name__, error.message


def _read_content(head: Head, pieces: list[bytes]) -> tuple[bytes, bytes | None]:
    """Return the content, and the bytes after it on the connection; None while the content is incomplete."""
    if not head.is_chunked:
        everything, length = b"".join(pieces), head.content_length or 0
        return everything[:length], everything[length:] if len(everything) >= length else None
    decoder = ChunkDecoder(OPTIONS)
    content, left = b"", b""
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
        left += piece[at:]
    assert len(content) <= OPTIONS.max_body_bytes
    return content, left if decoder.is_done else None


@functools.cache
def _spool() -> Spool:
    """Return one spool for all runs of the process: a run then takes microseconds, and leaks add up."""
    directory = tempfile.TemporaryDirectory()
    spool = Spool(Path(directory.name), 1 << 20)
    atexit.register(directory.cleanup)  # keeps the directory until the process exits
    return spool


def json_form(data: bytes) -> None:
    """Check that a document is read as by the standard library, except pictures, or gives a documented error."""
    spool = _spool()
    body = data[1:]
    sizes = [data[0] % 23 + 1] * len(body) if data else []
    try:
        form = read_form(MemoryBody(body, sizes), "application/json", spool, OPTIONS)
    except ApiError as error:
        assert isinstance(error, BadRequest | ContentTooLarge)
        assert spool.used_bytes == 0
        return
    document = json.loads(body)
    names = {name.partition("[")[0] for name, _ in form.fields} | {
        upload.name.partition("[")[0] for upload in form.uploads
    }
    assert names == {name.partition("[")[0] for name in document}
    plain = {name: value for name, value in form.fields if name in document}
    assert all(document[name] == value for name, value in plain.items())
    for upload in form.uploads:
        with upload.view() as view:
            assert len(view) == upload.size <= len(body)
    form.release()
    assert spool.used_bytes == 0


# --- image files ------------------------------------------------------------------------------------------------------

IMAGE_OPTIONS = settings(max_image_pixels=4_000_000, max_image_side_px=16_384)
DECODE_LIMITS = DecodeLimits(cpu_s=10.0, memory_bytes=1 << 30, wall_s=60.0)
SMALL_PIXELS, SMALL_CPU_S, SMALL_MEMORY_BYTES = 1_000_000, 0.5, 100_000_000
MAX_CPU_RATIO, MAX_MEMORY_RATIO = 4, 2
CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # of the CPU times in /proc


class _Usage(NamedTuple):
    cpu_s: float
    memory_bytes: int


class _DecoderBudget:
    """A decoder whose files are measured: CPU time of this process and of the child, and the child's peak memory."""

    def __init__(self) -> None:
        self._decoder = Decoder(DECODE_LIMITS)
        atexit.register(self._decoder.close)
        # Baseline pictures of one megapixel, noise included: what an honest sender may send.
        noise = Image.effect_noise((1000, 1000), 90).convert("RGB")
        files = [encoded("PNG", noise), encoded("JPEG", noise, progressive=True), encoded("WEBP", noise, lossless=True)]
        usages = [self.measure(data)[0] for data in files for _ in range(3)]
        self.baseline = _Usage(max(usage.cpu_s for usage in usages), max(usage.memory_bytes for usage in usages))

    def measure(self, data: bytes) -> tuple[_Usage, bool]:
        """Return what decoding a file costs, and whether its pixels came."""
        if not self._decoder.pid or self._child_cpu_s() < 0:
            self._decode(encoded("GIF"))  # starts a process
        pid, before_s, own_s = self._decoder.pid, self._child_cpu_s(), time.process_time()
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak
        before_bytes = self._child_bytes("VmRSS")
        has_pixels = self._decode(data)
        own_s = time.process_time() - own_s
        if self._decoder.pid != pid or (after_s := self._child_cpu_s()) < 0:
            return _Usage(own_s, 0), has_pixels  # killed at a limit, which is checked elsewhere
        return _Usage(own_s + after_s - before_s, self._child_bytes("VmHWM") - before_bytes), has_pixels

    def _decode(self, data: bytes) -> bool:
        limits = Limits(IMAGE_OPTIONS.max_image_pixels, IMAGE_OPTIONS.max_image_side_px)
        try:
            self._decoder.decode(memoryview(data), "image", limits)
        except ImageError:
            return False
        return True

    def _child_cpu_s(self) -> float:
        try:
            stat = Path(f"/proc/{self._decoder.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except FileNotFoundError:
            return -1.0
        return -1.0 if stat[0] == b"Z" else (int(stat[11]) + int(stat[12])) * CLOCK_TICK_S

    def _child_bytes(self, field: str) -> int:
        lines = Path(f"/proc/{self._decoder.pid}/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@functools.cache
def _budget() -> _DecoderBudget:
    logging.getLogger("ovserve").setLevel(logging.CRITICAL)
    return _DecoderBudget()


def image(data: bytes) -> None:
    """Check that header check and decoding give pixels or an ImageError, within a budget of CPU time and memory."""
    try:
        head = read_head(memoryview(data), "image", IMAGE_OPTIONS)
    except ImageError:
        return
    budget = _budget()
    pixels = head.width * head.height
    cpu_s, memory_bytes = SMALL_CPU_S, SMALL_MEMORY_BYTES
    if pixels > SMALL_PIXELS:
        cpu_s = max(cpu_s, MAX_CPU_RATIO * budget.baseline.cpu_s * pixels / 1_000_000)
        memory_bytes = max(memory_bytes, int(MAX_MEMORY_RATIO * budget.baseline.memory_bytes * pixels / 1_000_000))
    usage, _ = budget.measure(data)
    assert usage.cpu_s <= cpu_s + 2 * CLOCK_TICK_S, (
        f"{usage.cpu_s:.2f} s for {pixels} pixels, the budget is {cpu_s:.2f}"
    )
    assert usage.memory_bytes <= memory_bytes, f"{usage.memory_bytes} bytes for {pixels} pixels"


def proxy(data: bytes) -> None:
    """Check that a PROXY header gives an address or MalformedRequest, that pieces change nothing, and the bounds."""
    outcomes = [_read_proxy_header(data, limit) for limit in (1 << 20, 1, 3)]
    assert outcomes[0] == outcomes[1] == outcomes[2], outcomes


def _read_proxy_header(data: bytes, limit: int) -> tuple[str | None, int]:
    """Return the address (or the error) and how many bytes were taken, in pieces of at most `limit` bytes."""
    header, taken = ProxyHeader(), 0
    try:
        while header.wanted and taken < len(data):
            piece = data[taken : taken + min(limit, header.wanted)]
            taken += len(piece)
            header.feed(piece)
            assert taken + header.wanted <= 16 + MAX_EXTENSION_BYTES
    except MalformedRequest as error:
        return error.message, -1
    if header.wanted:
        return "incomplete", -1
    if header.address is not None:
        assert str(ip_address(header.address)) == header.address
    return header.address, taken


TARGETS = {"image": image, "multipart": multipart, "framing": framing, "json": json_form, "proxy": proxy}
