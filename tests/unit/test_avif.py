"""The boxes of AVIF files: brands, size and code points; damaged boxes end a search."""

from __future__ import annotations

import contextlib
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.errors import ImageError
from ovserve.pixels.avif import avif_codes, avif_size, is_avif
from ovserve.pixels.colour import Codes
from ovserve.pixels.counts.inspect import inspect


def box(kind: bytes, content: bytes, *, form: str = "short") -> bytes:
    if form == "long":
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 0 if form == "open" else 8 + len(content), kind) + content


def properties(*parts: bytes, form: str = "short") -> bytes:
    container = box(b"iprp", box(b"ipco", b"".join(parts), form=form), form=form)
    return box(b"ftyp", b"avif\0\0\0\0mif1") + box(b"meta", bytes(4) + container, form=form)


def size_of(width: int, height: int) -> bytes:
    return box(b"ispe", struct.pack(">4xII", width, height))


NCLX = box(b"colr", b"nclx" + struct.pack(">HHHB", 9, 16, 9, 0x80))


@pytest.mark.parametrize("form", ["short", "long", "open"])
def test_size_and_code_points_are_found_in_boxes_of_every_length_form(form: str) -> None:
    data = properties(size_of(8, 8), box(b"colr", b"prof"), NCLX, size_of(31, 17), size_of(16, 16), form=form)
    assert avif_size(data) == avif_size(memoryview(data)) == (31, 17)
    assert avif_codes(data) == Codes(9, 16)


@pytest.mark.parametrize("parts", [(), (b"\0\0\0\7ispe",), (struct.pack(">I4s", 400, b"ispe"),)])
def test_file_without_a_size_or_code_points_has_none(parts: tuple[bytes, ...]) -> None:
    data = properties(*parts)
    assert avif_codes(data) is None
    with pytest.raises(ValueError, match="max"):
        avif_size(data)
    with pytest.raises(ImageError, match="not a readable"):
        inspect(memoryview(data), "image")


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1miaf", True),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", True),
        (b"\0\0\0\x10ftypmif1\0\0\0\0avif", False),  # behind the end of the box
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", False),
        (b"\0\0\0\x18freeavif\0\0\0\0mif1avif", False),
        (b"", False),
    ],
)
def test_avif_is_recognised_by_its_brands(start: bytes, found: bool) -> None:
    assert is_avif(start) == found


def test_avif_is_never_baseline() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (31, 17)).save(stream, "AVIF")
    facts = inspect(memoryview(stream.getvalue()), "image")
    assert (facts.format, facts.width, facts.height, facts.is_baseline) == ("AVIF", 31, 17, False)


@given(st.binary(max_size=200))
def test_random_properties_never_raise_anything_else(content: bytes) -> None:
    data = properties(content)
    avif_codes(data)
    with contextlib.suppress(ValueError, struct.error):
        avif_size(data)
