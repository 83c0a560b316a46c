"""The text that image programs write into files: read from the bytes, and parsed into its fields.

PNG: text chunks (third edition, section 11.3.3). JPEG and WebP: UserComment of the EXIF block (EXIF 2.32 section
4.6.5). No pixel is decoded. Every loop has a bound, and decompressed text has a limit; a damaged file gives the text
found before the damage.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import zlib
from collections.abc import Iterator

__all__ = ["PARAMETERS", "parse_infotext", "read_texts"]

PARAMETERS = "parameters"  # the key of seed and settings
MAX_CHUNKS = 20_000  # of a file; a PNG of 50 MB has 6400 chunks of 8 KiB
MAX_TEXTS = 100
MAX_TEXT_BYTES = 1024 * 1024  # of one text, decompressed
MAX_ENTRIES = 1000  # of an EXIF directory
_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_ENCODINGS = {b"UNICODE\0": "utf-16", b"ASCII\0\0\0": "ascii", b"\0\0\0\0\0\0\0\0": "utf-8"}
# `Key: value` and `Key: "quoted"`, as the last line of the parameters has them.
_PAIR = re.compile(r'\s*([\w &/-]{1,100}):\s*("(?:\\.|[^\\"])*+"|[^,]*)(?:,|$)')
_MIN_PAIRS = 3  # a last line with fewer is part of the prompt
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_NEGATIVE = "Negative prompt:"


def read_texts(data: memoryview) -> dict[str, str]:
    """Return the texts of an image file by key; those of JPEG and WebP have the key PARAMETERS.

    Args:
        data: the whole file; any bytes give a result.
    """
    texts: dict[str, str] = {}
    with contextlib.suppress(struct.error, ValueError, zlib.error):
        start = bytes(data[:12])
        if start.startswith(_PNG):
            for key, text in _png_texts(data):
                texts.setdefault(key, text)
                if len(texts) == MAX_TEXTS:
                    break
        elif start.startswith(b"\xff\xd8"):
            texts = _comment_of(_jpeg_exif(data))
        elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
            texts = _comment_of(_webp_exif(data))
    return texts


def _png_texts(data: memoryview) -> Iterator[tuple[str, str]]:
    at = len(_PNG)
    for _ in range(MAX_CHUNKS):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        if kind in (b"tEXt", b"zTXt", b"iTXt") and size <= MAX_TEXT_BYTES:
            body = bytes(data[at + 8 : at + 8 + size])
            keyword, _, rest = body.partition(b"\0")
            text = _png_text(kind, rest)
            if text is not None:
                yield keyword.decode("latin-1"), text
        at += size + 12


def _png_text(kind: bytes, rest: bytes) -> str | None:
    """Return the text of a chunk after its keyword; None if it is damaged or too long."""
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return _decoded(_inflated(rest[1:]), "latin-1")
    is_compressed = rest[:1] == b"\1"
    _, _, rest = rest[2:].partition(b"\0")  # the language
    _, _, rest = rest.partition(b"\0")  # the translated keyword
    return _decoded(_inflated(rest) if is_compressed else rest, "utf-8")


def _inflated(data: bytes) -> bytes | None:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MAX_TEXT_BYTES + 1)
    except zlib.error:
        return None
    return text if len(text) <= MAX_TEXT_BYTES and stream.eof else None


def _decoded(text: bytes | None, encoding: str) -> str | None:
    return None if text is None else text.decode(encoding, "replace")


def _jpeg_exif(data: memoryview) -> bytes:
    at = 2
    for _ in range(MAX_CHUNKS):
        marker, size = struct.unpack_from(">HH", data, at)
        if marker < 0xFF00 or marker == 0xFFDA:  # the scan: pictures follow
            break
        if marker == 0xFFE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
            return bytes(data[at + 10 : at + 2 + size])
        at += 2 + max(2, size)
    return b""


def _webp_exif(data: memoryview) -> bytes:
    at = 12
    for _ in range(MAX_CHUNKS):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            block = bytes(data[at + 8 : at + 8 + min(size, 2 * MAX_TEXT_BYTES + 4096)])
            return block.removeprefix(b"Exif\0\0")
        at += 8 + size + size % 2
    return b""


def _comment_of(exif: bytes) -> dict[str, str]:
    """Return the UserComment of an EXIF block, a TIFF file."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return {}
    (first,) = struct.unpack_from(f"{order}I", exif, 4)
    directory = _entry(exif, order, first, _EXIF_IFD)
    if directory is None:
        return {}
    found = _entry(exif, order, directory[1], _USER_COMMENT)
    if found is None or found[0] < 8:
        return {}
    count, at = found
    code, text = exif[at : at + 8], exif[at + 8 : at + min(count, MAX_TEXT_BYTES)]
    encoding = _ENCODINGS.get(code)
    if encoding is None:
        return {}
    if encoding == "utf-16":  # big-endian as image programs write it, unless the first character shows otherwise
        encoding = "utf-16-le" if text[1:2] == b"\0" and text[:1] != b"\0" else "utf-16-be"
    return {PARAMETERS: text.decode(encoding, "replace").rstrip("\0")}


def _entry(exif: bytes, order: str, directory: int, wanted: int) -> tuple[int, int] | None:
    """Return count and value, or the offset of the value, of a tag in a directory."""
    (count,) = struct.unpack_from(f"{order}H", exif, directory)
    for index in range(min(count, MAX_ENTRIES)):
        tag, _, values, value = struct.unpack_from(f"{order}HHII", exif, directory + 2 + 12 * index)
        if tag == wanted:
            return values, value
    return None


def parse_infotext(text: str) -> dict[str, str]:
    """Return the fields of a text of parameters, as `png-info` shows them: `Prompt`, `Steps`, `Sampler`, ...

    The text is a prompt, a negative prompt and one line of pairs; each may be missing. `Size` is split into `Size-1`
    and `Size-2`.
    """
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < _MIN_PAIRS:
        lines, pairs = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    current = prompt
    for line in lines:
        stripped = line.strip()
        if stripped.startswith(_NEGATIVE):
            current, stripped = negative, stripped.removeprefix(_NEGATIVE).strip()
        current.append(_unquoted(stripped))
    found = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for key, written in pairs:
        value = _unquoted(written.strip())
        if size := _SIZE.fullmatch(value):
            found |= {f"{key}-1": size[1], f"{key}-2": size[2]}
        else:
            found[key] = value
    return found


def _unquoted(text: str) -> str:
    """Return a text without the quotation marks of JSON, in which a text that could be misread is written."""
    if text.startswith('"') and text.endswith('"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(text))
    return text
