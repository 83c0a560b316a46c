"""Format and dimensions from the header alone."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.api.parameters.imagehead import read_head
from ovserve.config import Settings
from ovserve.errors import ImageError
from tests.forms import encoded

SETTINGS = Settings()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(form: str) -> None:
    head = read_head(memoryview(encoded(31, 17, form)), "image", SETTINGS)
    assert (head.format, head.width, head.height) == (form, 31, 17)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read_by_a_process_that_has_read_none_before(form: str) -> None:
    stream = io.BytesIO()
    picture = Image.new("RGB", (9, 7))
    picture.save(stream, form, **({"save_all": True, "append_images": [picture]} if form == "MPO" else {}))
    code = (
        "import sys; from ovserve.api.parameters.imagehead import read_head; from ovserve.config import Settings;"
        "print(read_head(memoryview(sys.stdin.buffer.read()), 'image', Settings()).format)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=stream.getvalue(), capture_output=True, check=True, timeout=60
    )
    assert done.stdout.decode().strip() == form


def test_a_bomb_is_refused_without_decoding_it() -> None:
    data = bytearray(encoded(1, 1))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR's width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="60000x60000"):
        read_head(memoryview(data), "image[1]", SETTINGS)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("extended", [False, True])
def test_a_webp_is_refused_by_its_first_bytes(lossless: bool, extended: bool) -> None:
    stream = io.BytesIO()
    Image.new("RGBA" if extended else "RGB", (300, 200), (9, 9, 9, 9)).save(stream, "WEBP", lossless=lossless)
    small = Settings(max_image_pixels=300 * 200 - 1)
    with pytest.raises(ImageError, match="300x200"):
        read_head(memoryview(stream.getvalue())[:30], "image", small)  # no more than these: Pillow could not open it
    assert read_head(memoryview(stream.getvalue()), "image", SETTINGS).width == 300


@pytest.mark.parametrize(
    ("start", "name"), [(b"\x00\x00\x00\x20ftypavif", "AVIF"), (b"%PDF-1.7", "PDF"), (b"<svg xmlns", "SVG")]
)
def test_a_foreign_format_is_named(start: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=name):
        read_head(memoryview(start + b"\0" * 64), "image", SETTINGS)


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_the_documented_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        read_head(memoryview(data), "image", SETTINGS)
    assert caught.value.param == "image"


@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_header_is_read_or_refused(form: str, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(20, 20, form)[:cut])
    for at, value in flips:
        if at < len(data):
            data[at] = value
    try:
        head = read_head(memoryview(data), "image", SETTINGS)
    except ImageError:
        return
    assert head.width * head.height <= SETTINGS.max_image_pixels
