"""Format and dimensions of an upload, read from its header alone."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ovserve.api.parameters.imagehead import read_head
from ovserve.errors import ImageError
from ovserve.settings.options import Settings
from tests.forms import encoded

SETTINGS = Settings()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_every_format_is_recognised(form: str) -> None:
    head = read_head(memoryview(encoded(31, 17, form)), "image", SETTINGS)
    assert (head.format, head.width, head.height) == (form, 31, 17)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_every_format_is_recognised_in_a_new_process(form: str) -> None:
    stream = io.BytesIO()
    picture = Image.new("RGB", (9, 7))
    picture.save(stream, form, **({"save_all": True, "append_images": [picture]} if form == "MPO" else {}))
    code = (
        "import sys; from ovserve.api.parameters.imagehead import read_head; from ovserve.settings.options import "
        "Settings;"
        "print(read_head(memoryview(sys.stdin.buffer.read()), 'image', Settings()).format)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=stream.getvalue(), capture_output=True, check=True, timeout=60
    )
    assert done.stdout.decode().strip() == ("JPEG" if form == "MPO" else form)


def read_by_pillow(data: bytes) -> tuple[str, int, int, str]:
    with Image.open(io.BytesIO(data)) as image:
        return image.format or "", image.width, image.height, image.mode


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
        *(("JPEG", "RGB", {"progressive": True, "comment": b"c" * 70, "exif": exif}) for exif in (b"Exif\0\0abc",)),
        *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)),
        *(("AVIF", mode, options) for mode in ("RGB", "RGBA") for options in ({}, {"exif": Image.Exif().tobytes()})),
        *(("GIF", "P", {"comment": b"c" * size}) for size in (0, 60_000)),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (9, 9), 5)], "loop": 0}),
        *(("BMP", mode, {}) for mode in ("P", "RGB")),
        *(("TIFF", mode, {}) for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK")),
        ("TIFF", "RGB", {"big_tiff": True}),
    ],
)
def test_header_agrees_with_pillow(form: str, mode: str, options: dict[str, Any]) -> None:
    stream = io.BytesIO()
    picture = Image.new(mode, (31, 17))
    if mode == "P":
        picture.putpalette(bytes(range(30)))
    picture.save(stream, form, **options)
    head = read_head(memoryview(stream.getvalue()), "image", SETTINGS)
    format_read, width, height, mode_read = read_by_pillow(stream.getvalue())
    assert (head.format, head.width, head.height) == (format_read, width, height)
    # The header's mode does not include the bits per sample.
    assert head.mode == {"1": "L", "I;16": "L"}.get(mode_read, mode_read)


def test_header_of_sample_files_agrees_with_pillow(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 24)  # one sample has more text than Pillow opens
    pictures = [path for path in data.rglob("*") if path.suffix in {".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"}]
    assert pictures
    for path in pictures:
        if path.name.startswith("badcrc"):
            continue  # Pillow does not open it
        content = path.read_bytes()
        head = read_head(memoryview(content), "image", SETTINGS)
        assert (head.width, head.height) == read_by_pillow(content)[1:3], path


def test_gif_screen_is_enlarged_to_its_first_image() -> None:
    data = bytearray(encoded(20, 10, "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    head = read_head(memoryview(data), "image", SETTINGS)
    assert (head.width, head.height) == read_by_pillow(bytes(data))[1:3] == (20, 10)


def test_negative_height_of_a_bmp_is_accepted() -> None:
    data = bytearray(encoded(20, 10, "BMP"))
    data[22:26] = struct.pack("<i", -10)
    assert read_head(memoryview(data), "image", SETTINGS).height == 10


def tiff_of_widths(*entries: tuple[int, int, int]) -> bytes:
    """A TIFF of 8 pixels height, with these (type, count, value) entries for its width."""
    tiff = encoded(8, 8, "TIFF")
    (at,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, at)
    tags = [tiff[start : start + 12] for start in range(at + 2, at + 2 + 12 * count, 12)]
    kept = [tag for tag in tags if tag[:2] != struct.pack("<H", 256)]
    widths = [struct.pack("<HHIi", 256, *entry) for entry in entries]
    directory = struct.pack("<H", len(kept) + len(widths)) + b"".join(widths + kept) + bytes(4)
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + directory


@pytest.mark.parametrize("widths", [[(4, 1, 8), (4, 1, 4)], [(3, 1, 4), (4, 1, 8)], [(9, 1, 8)]])
def test_width_of_a_tiff_agrees_with_pillow(widths: list[tuple[int, int, int]]) -> None:
    tiff = tiff_of_widths(*widths)
    assert read_head(memoryview(tiff), "image", SETTINGS).width == read_by_pillow(tiff)[1] == widths[0][2]


@pytest.mark.parametrize("width", [(4, 0, 8), (3, 2, 8), (9, 1, -8)])
def test_tiff_without_exactly_one_positive_width_is_rejected(width: tuple[int, int, int]) -> None:
    with pytest.raises(ImageError):
        read_head(memoryview(tiff_of_widths(width)), "image", SETTINGS)


def gif_of_blocks(count: int) -> bytes:
    gif = encoded(8, 8, "GIF")
    end = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:end] + b"!\xfe" + b"\x01a" * count + b"\0" + gif[end:]


def jpeg_of_segments(segment: bytes, count: int) -> bytes:
    jpeg = encoded(8, 8, "JPEG")
    return jpeg[:2] + segment * count + jpeg[2:]


def tiff_of_tags(count: int, size: int) -> bytes:
    entries = b"".join(struct.pack("<HHII", 40_000 + k, 7, size, 8) for k in range(count))
    sides = struct.pack("<HHIIHHII", 256, 4, 1, 8, 257, 4, 1, 8)
    return b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + struct.pack("<H", count + 2) + sides + entries


def png_of_texts(count: int) -> bytes:
    png = encoded(8, 8)
    chunk = b"zTXtk\0\0" + zlib.compress(bytes(1_000_000))
    return (
        png[:33] + (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))) * count + png[33:]
    )


@pytest.mark.parametrize(
    ("make", "is_read"),
    [
        (lambda: gif_of_blocks(10_000_000), False),
        (lambda: gif_of_blocks(15_000), True),
        (lambda: jpeg_of_segments(b"\xff\xef\0\2", 3_750_000), False),
        (lambda: jpeg_of_segments(b"\xff" * 1_000_000, 1), True),
        (lambda: jpeg_of_segments(b"\xff\xe1\xff\xffExif\0\0" + bytes(65527), 900), True),
        (lambda: tiff_of_tags(5_000, 1_000_000), True),
        (lambda: png_of_texts(60), True),
        (lambda: encoded(8, 8)[:33] + bytes(20_000_000), False),
        (lambda: jpeg_of_segments(b"\xff\xef\0\2" + b"\xff" * 20_000_000, 1), False),
        (lambda: jpeg_of_segments(b"\xff\xef\0\2" + bytes(25_000), 40), True),
        (lambda: jpeg_of_segments(b"\xff\xef\0\2" + bytes(20_000_000), 1), False),
        (lambda: jpeg_of_segments(b"\xff\xef\0\2" + b"\0\xff\xff" * 200_000, 1), True),
    ],
    ids=[
        "gif",
        "gif within",
        "jpeg",
        "jpeg fill",
        "exif",
        "tiff",
        "png texts",
        "png chunks",
        "jpeg much fill",
        "jpeg junk",
        "jpeg much junk",
        "jpeg mixed junk",
    ],
)
def test_items_before_the_size_cost_little_time_and_memory(make: Callable[[], bytes], is_read: bool) -> None:
    """Check bounds that Pillow does not keep: 1.3 GB for the first, 14 s for the third, quadratic time for the fifth,
    5 GB for the sixth.
    """
    content = memoryview(make())
    tracemalloc.start()
    try:
        started = time.process_time()
        try:
            assert read_head(content, "image", SETTINGS).width == 8
            assert is_read
        except ImageError as error:
            assert not is_read
            assert "header cannot be read" in error.message
        taken, (_, most) = time.process_time() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1  # takes a few milliseconds
    assert most < 200_000


def test_decompression_bomb_is_rejected_without_decoding() -> None:
    data = bytearray(encoded(1, 1))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR's width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="60000x60000"):
        read_head(memoryview(data), "image[1]", SETTINGS)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("extended", [False, True])
def test_too_large_webp_is_rejected_from_its_first_bytes(lossless: bool, extended: bool) -> None:
    stream = io.BytesIO()
    Image.new("RGBA" if extended else "RGB", (300, 200), (9, 9, 9, 9)).save(stream, "WEBP", lossless=lossless)
    small = Settings(max_image_pixels=300 * 200 - 1)
    with pytest.raises(ImageError, match="300x200"):
        read_head(memoryview(stream.getvalue())[:30], "image", small)  # 30 bytes, which Pillow cannot open
    assert read_head(memoryview(stream.getvalue()), "image", SETTINGS).width == 300


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, which this server cannot read: the package pi_heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is HEIC, which this server cannot read: the package pi_heif"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc", "is HEIC, which this server cannot read: the package pi_heif"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0mif1", "is HEIF, which is not supported"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns", "SVG"),
    ],
)
def test_unsupported_format_is_named(monkeypatch: pytest.MonkeyPatch, start: bytes, name: str) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)  # as if the extra was not installed
    with pytest.raises(ImageError, match=name):
        read_head(memoryview(start + b"\0" * 64), "image", SETTINGS)


def test_avif_is_recognised_by_a_compatible_brand_and_measured_without_its_tiles() -> None:
    data = bytearray(encoded(31, 17, "AVIF"))
    assert data[8:12] == b"avif"
    data[8:12] = b"mif1"
    assert b"avif" in data[16:40]
    head = read_head(memoryview(data), "image", SETTINGS)
    assert (head.format, head.width, head.height) == ("AVIF", 31, 17)
    at = data.index(b"ispe")
    tile = bytearray(data[at - 4 : at + 16])
    tile[-8:] = struct.pack(">II", 8, 8)
    tiled = data[: at - 4] + tile + data[at - 4 :]
    for box in (b"ipco", b"iprp", b"meta"):
        start = tiled.index(box) - 4
        tiled[start : start + 4] = struct.pack(">I", struct.unpack_from(">I", tiled, start)[0] + len(tile))
    head = read_head(memoryview(tiled), "image", SETTINGS)
    assert (head.width, head.height) == (31, 17)


@pytest.mark.parametrize("kind", [b"meta", b"iprp", b"ipco", b"ispe"])
def test_avif_without_a_size_is_rejected(kind: bytes) -> None:
    with pytest.raises(ImageError, match="header cannot be read"):
        read_head(memoryview(encoded(31, 17, "AVIF").replace(kind, b"free")), "image", SETTINGS)


def test_offset_of_64_bits_beyond_the_file_is_rejected() -> None:
    data = b"II+\0\x08\0\0\0" + struct.pack("<Q", 1 << 63) + bytes(64)
    with pytest.raises(ImageError, match="damaged or truncated"):
        read_head(memoryview(data), "image", SETTINGS)


@given(st.binary(max_size=300))
def test_random_bytes_raise_image_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        read_head(memoryview(data), "image", SETTINGS)
    assert caught.value.param == "image"


@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4),
)
def test_damaged_header_is_read_or_rejected(form: str, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(20, 20, form)[:cut])
    for at, value in flips:
        if at < len(data):
            data[at] = value
    try:
        head = read_head(memoryview(data), "image", SETTINGS)
    except ImageError:
        return
    assert head.width * head.height <= SETTINGS.max_image_pixels


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_transparent_colour_without_alpha_is_recognised(mode: str) -> None:
    stream, plain = io.BytesIO(), io.BytesIO()
    picture = Image.new(mode, (3, 2))
    picture.save(stream, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    picture.save(plain, "PNG")
    assert read_head(memoryview(stream.getvalue()), "image", Settings()).may_be_transparent
    # Only the worker reads the entries of a palette.
    assert read_head(memoryview(plain.getvalue()), "image", Settings()).may_be_transparent is (mode == "P")
