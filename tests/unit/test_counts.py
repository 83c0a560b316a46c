"""What an image file makes a decoder repeat is counted, and bounded, before decoding."""

from __future__ import annotations

import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ovserve.errors import ImageError
from ovserve.pixels.counts import bmp, gif, jpeg, png, tiff, walk, webp
from ovserve.pixels.counts.inspect import FileFacts, inspect
from ovserve.pixels.images import Limits, decode_image
from tests import imagefiles as files
from tests.imagefiles import png_chunk, segment, webp_chunk

MIB = 1 << 20
LIMITS = Limits(50_000_000, 16_384)


def facts(data: bytes) -> FileFacts:
    return inspect(memoryview(data), "image")


def png_of_idats(count: int) -> bytes:
    return files.png(between=png_chunk(b"IDAT") * (count - 2))


def gif_of_bytes(count: int) -> bytes:
    """Return a GIF whose first frame has this many bytes of pixels, sub-block lengths included."""
    data = files.gif()
    blocks = len(data) - 2 - data.index(b"\x2c\0\0\0\0\x10\0\x10\0") - 11
    more = count - blocks
    return files.gif(
        more=b"\xff" + bytes(255) + (b"\xff" + bytes(255)) * ((more - 258) // 256) + b"\1\0" if more else b""
    )


GIF_BLOCK_BYTES = len(files.gif()) - 2 - files.gif().index(b"\x2c\0\0\0\0\x10\0\x10\0") - 11

# What is repeated, the limit, and a file that repeats it n times.
CASES: dict[str, tuple[str, int, Callable[[int], bytes]]] = {
    "jpeg_passes": ("passes over its blocks", jpeg.MAX_JPEG_PASSES, files.jpeg_scans),
    "jpeg_segments": (
        "segments",
        jpeg.MAX_JPEG_SEGMENTS,
        lambda n: files.jpeg(before=segment(0xFE, b"") * (n - files.jpeg().count(b"\xff") + _stuffed(files.jpeg()))),
    ),
    "jpeg_junk": (
        "bytes between its segments",
        jpeg.MAX_JPEG_JUNK_BYTES,
        lambda n: files.jpeg(before=segment(0xFE, b"") + b"\0" * n),
    ),
    "jpeg_exif": (
        "bytes of EXIF data",
        walk.MAX_EXIF_BYTES,
        lambda n: files.jpeg(
            before=segment(0xE1, b"Exif\0\0" + bytes(65_526)) * 4
            + segment(0xE1, b"Exif\0\0" + bytes(n - 4 * 65_534 - 8))
        ),
    ),
    "png_idats": (
        "chunks for",
        png.MIN_PNG_DATA_CHUNKS,
        png_of_idats,
    ),
    "png_chunks": (
        "chunks besides IDAT",
        png.MAX_PNG_CHUNKS,
        lambda n: files.png(before=png_chunk(b"prVt") * 10, after=png_chunk(b"prVt") * (n - 12)),
    ),
    "png_exif": ("bytes of EXIF data", walk.MAX_EXIF_BYTES, lambda n: files.png(after=png_chunk(b"eXIf", bytes(n)))),
    "gif_blocks": (
        "blocks before its first frame",
        gif.MAX_GIF_BLOCKS,
        lambda n: files.gif(before=b"\x21\xfe" + b"\1a" * (n - 1) + b"\0"),
    ),
    "gif_pixel_blocks": (
        "blocks for",
        # The largest number of blocks that their bytes allow: one of ordinary size, the others of 2 bytes.
        next(n for n in range(8192, 9999) if n + 1 > gif.MAX_GIF_BLOCKS + (2 * n + GIF_BLOCK_BYTES) // 32),
        lambda n: files.gif(more=b"\1\0" * (n - 1)),
    ),
    "webp_chunks": ("chunks", webp.MAX_WEBP_CHUNKS, lambda n: files.webp(*[webp_chunk(b"prVt", b"")] * (n - 2))),
    "webp_exif": ("bytes of EXIF data", walk.MAX_EXIF_BYTES, lambda n: files.webp(webp_chunk(b"EXIF", bytes(n)))),
    "webp_metadata": (
        "bytes of metadata",
        walk.MAX_METADATA_BYTES,
        lambda n: files.webp(webp_chunk(b"XMP ", bytes(n))),
    ),
    "bmp_rle": (
        "bytes of run-length codes",
        bmp.MIN_BMP_RLE_BYTES + bmp.MAX_BMP_RLE_BYTES_PER_PIXEL * 17 * 16,
        lambda n: files.bmp_rle((b"\x10\5\0\0" * 16 + b"\0\1").ljust(n, b"\0")),
    ),
    "tiff_strips": (
        "strips where its size needs 1",
        1 + tiff.MAX_TIFF_SPARE_STRIPS,
        lambda n: files.tiff({273: (4, [16] * n), 279: (4, [256] * n)}),
    ),
    "tiff_directories": ("directories", tiff.MAX_TIFF_DIRECTORIES, lambda n: files.tiff(directories=n)),
    "bigtiff_directories": (
        "directories",
        tiff.MAX_TIFF_DIRECTORIES,
        lambda n: files.tiff(directories=n, is_big=True),
    ),
    "tiff_tags": (
        "tags in its first directory",
        tiff.MAX_TIFF_TAGS,
        lambda n: files.tiff({50_000 + k: (3, [1]) for k in range(n - 9)}),
    ),
    "tiff_values": (
        "numbers in the tags",
        tiff.MAX_TIFF_VALUES,
        lambda n: files.tiff({282: (5, [1] * (2 * (n - 7)))}),
    ),
    "tiff_metadata": (
        "bytes of metadata",
        walk.MAX_METADATA_BYTES,
        lambda n: files.tiff({700: (7, bytes(n))}),
    ),
    "tiff_tile_area": (
        "pixels in its tiles",
        0,
        lambda n: files.tiff(
            {322: (4, [1024 + 2 * n]), 323: (4, [1024]), 324: (4, [16]), 325: (4, [256])}, size=(16, 16)
        ).replace(struct.pack("<HHII", 273, 4, 1, 16), struct.pack("<HHII", 272, 4, 1, 16)),
    ),
}


def _stuffed(data: bytes) -> int:
    """Return how many 0xFF bytes of a JPEG begin no counted segment."""
    return data.count(b"\xff") - sum(1 for _ in _segments(data))


def _segments(data: bytes) -> list[int]:
    return [match.start() for match in re.finditer(rb"\xff[^\x00\xd0-\xd8\xff]", data)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_each_count_passes_at_its_limit_and_fails_one_above(name: str) -> None:
    text, limit, make = CASES[name]
    found = facts(make(limit))
    assert (found.width, found.height) == (16, 16)
    with pytest.raises(ImageError, match=text) as caught:
        facts(make(limit + 1))
    assert caught.value.param == "image"
    assert caught.value.code == "invalid_image_file"
    assert "allows at most" in caught.value.message


def test_pixel_bytes_of_a_gif_are_bounded_by_its_pixels() -> None:
    limit = gif.MIN_GIF_BYTES + gif.MAX_GIF_BYTES_PER_PIXEL * 256
    assert facts(gif_of_bytes(limit - 1000)).width == 16
    with pytest.raises(ImageError, match="bytes in its first frame"):
        facts(gif_of_bytes(limit + 1000))


def test_bytes_of_a_file_are_bounded_by_its_pixels() -> None:
    limit = walk.MIN_FILE_BYTES + walk.MAX_FILE_BYTES_PER_PIXEL * 256
    data = files.tiff()
    assert facts(data.ljust(limit, b"\0")).end == limit
    with pytest.raises(
        ImageError, match=f"{limit + 1} or more bytes for 16x16 pixels; this server allows at most {limit}"
    ):
        facts(data.ljust(limit + 1, b"\0"))


def test_overlapping_strips_pass_at_twice_the_file_and_fail_above() -> None:
    def strips(last: int) -> bytes:
        return files.tiff({273: (4, [16] * 16), 278: (4, [1]), 279: (4, [size // 8] * 15 + [last])})

    size = 0
    size = len(strips(0))
    last = 2 * size - size // 8 * 15
    assert facts(strips(last)).height == 16
    with pytest.raises(ImageError, match="bytes in its strips, which overlap; this server allows at most"):
        facts(strips(last + 1))


def test_small_tiles_are_rejected() -> None:
    tags = {322: (4, [8]), 323: (4, [16]), 324: (4, [16, 16]), 325: (4, [128, 128])}
    data = files.tiff(tags).replace(struct.pack("<HHII", 273, 4, 1, 16), struct.pack("<HHII", 272, 4, 1, 16))
    with pytest.raises(ImageError, match="tiles of 8x16; this server allows at least 16 pixels on a side"):
        facts(data)


def test_numbers_in_a_directory_of_exif_data_are_bounded() -> None:
    inner = files.tiff({282: (5, [1] * 2 * tiff.MAX_TIFF_VALUES)}, size=(1, 1))
    (at,) = struct.unpack_from("<I", inner, 4)
    outer = files.tiff({34665: (4, [at])}, size=(1, 1))
    # The inner file's directory at its offset, the outer file's directory behind it.
    (outer_at,) = struct.unpack_from("<I", outer, 4)
    data = inner[:4] + struct.pack("<I", len(inner)) + inner[8:] + outer[outer_at:]
    with pytest.raises(ImageError, match="numbers in the tags of its directory of EXIF data"):
        facts(data)


def test_repeated_jpeg_tables_are_bounded() -> None:
    tags = {278: (4, [1]), 273: (4, [16] * 4096), 279: (4, [1] * 4096), 347: (7, bytes(16_385))}
    with pytest.raises(ImageError, match="bytes of JPEG tables for all strips"):
        facts(files.tiff(tags, size=(1, 4096)))


@pytest.mark.parametrize("name", ["scan100.jpg", "g3.tif"])
def test_counting_takes_milliseconds(name: str, data: Path) -> None:
    content = (data / "bombs" / name).read_bytes()
    started = time.process_time()
    for _ in range(10):
        try:
            facts(content)
        except ImageError:
            assert name == "scan100.jpg"
    assert time.process_time() - started < 0.5


# --- ordinary files ---------------------------------------------------------------------------------------------------

PHOTO = Image.effect_mandelbrot((160, 120), (-2, -1.5, 1, 1.5), 90).convert("RGB")
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GRAY_PROFILE = SRGB_PROFILE[:16] + b"GRAY" + SRGB_PROFILE[20:]
ORDINARY = {
    "jpeg": (files.encoded("JPEG", PHOTO), True),
    "jpeg_420": (files.encoded("JPEG", PHOTO, subsampling="4:2:0"), True),
    "jpeg_411": (files.encoded("JPEG", PHOTO, subsampling=2, quality=20), True),
    "jpeg_gray": (files.encoded("JPEG", PHOTO.convert("L")), True),
    "jpeg_cmyk": (files.encoded("JPEG", PHOTO.convert("CMYK")), True),
    "jpeg_restarts": (files.encoded("JPEG", PHOTO, restart_marker_blocks=1), True),
    "jpeg_progressive": (files.encoded("JPEG", PHOTO, progressive=True, subsampling=0), False),
    "jpeg_gray_progressive": (files.encoded("JPEG", PHOTO.convert("L"), progressive=True), False),
    "mpo": (files.encoded("MPO", PHOTO, save_all=True, append_images=[PHOTO]), True),
    "png": (files.encoded("PNG", PHOTO), True),
    "png_palette": (files.encoded("PNG", PHOTO.quantize(16)), True),
    "png_alpha": (files.encoded("PNG", PHOTO.convert("RGBA")), True),
    "png_profile": (files.encoded("PNG", PHOTO, icc_profile=SRGB_PROFILE), True),
    "png_other_profile": (files.encoded("PNG", PHOTO.convert("L"), icc_profile=GRAY_PROFILE), False),
    "png_large_profile": (files.encoded("PNG", PHOTO, icc_profile=SRGB_PROFILE + bytes(MIB)), False),
    "png_profiles": (files.png(before=png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(MIB))) * 100), False),
    "png_texts": (files.png(after=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MIB))) * 50), True),
    "png_20_mb_of_text": (files.png(after=png_chunk(b"tEXt", b"a\0" + bytes(20 * MIB))), False),
    "jpeg_profile": (files.encoded("JPEG", PHOTO, icc_profile=SRGB_PROFILE), True),
    "jpeg_other_profile": (files.encoded("JPEG", PHOTO.convert("L"), icc_profile=GRAY_PROFILE), False),
    "jpeg_cmyk_profile": (files.encoded("JPEG", PHOTO.convert("CMYK"), icc_profile=SRGB_PROFILE), False),
    "jpeg_large_profile": (files.encoded("JPEG", PHOTO, icc_profile=SRGB_PROFILE + bytes(MIB)), False),
    "avif": (files.encoded("AVIF", PHOTO), False),
    "apng": (files.encoded("PNG", PHOTO, save_all=True, append_images=[PHOTO.rotate(90)]), False),
    "gif": (files.encoded("GIF", PHOTO), False),
    "gif_animated": (files.encoded("GIF", PHOTO, save_all=True, append_images=[PHOTO.rotate(90)]), False),
    "webp": (files.encoded("WEBP", PHOTO), False),
    "webp_lossless": (files.encoded("WEBP", PHOTO, lossless=True), False),
    "webp_alpha": (files.encoded("WEBP", PHOTO.convert("RGBA")), False),
    "webp_animated": (files.encoded("WEBP", PHOTO, save_all=True, append_images=[PHOTO.rotate(90)]), False),
    "bmp": (files.encoded("BMP", PHOTO), False),
    "bmp_palette": (files.encoded("BMP", PHOTO.quantize(16)), False),
    "bmp_rle": (files.bmp_rle(b"\x10\5\0\0" * 16 + b"\0\1"), False),
    "tiff": (files.encoded("TIFF", PHOTO), False),
    "tiff_lzw": (files.encoded("TIFF", PHOTO, compression="tiff_lzw"), False),
    "tiff_jpeg": (files.encoded("TIFF", PHOTO, compression="jpeg"), False),
    "tiff_g4": (files.encoded("TIFF", PHOTO.convert("1"), compression="group4"), False),
    "tiff_pages": (files.encoded("TIFF", PHOTO, save_all=True, append_images=[PHOTO] * 20), False),
    "bigtiff": (files.encoded("TIFF", PHOTO, big_tiff=True), False),
}


@pytest.mark.parametrize("name", sorted(ORDINARY))
def test_ordinary_files_pass_and_keep_their_pixels(name: str) -> None:
    data, is_baseline = ORDINARY[name]
    found = facts(data)
    assert found.is_baseline == is_baseline
    whole = decode_image(data, "image", LIMITS)
    assert whole.shape[:2] == (found.height, found.width)
    assert (decode_image(data[: found.end], "image", LIMITS) == whole).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_bytes_after_the_first_image_are_not_needed(form: str) -> None:
    data = files.encoded(form, PHOTO)
    assert facts(data + bytes(100_000)).end == len(data) - (form == "GIF")


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP"]
)
def test_files_without_a_size_are_rejected(data: bytes) -> None:
    with pytest.raises(ImageError, match="image: not a readable PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF image"):
        facts(data)


@given(
    st.sampled_from([data for data, _ in ORDINARY.values()]),
    st.integers(0),
    st.binary(min_size=1, max_size=8),
    st.booleans(),
)
def test_damaged_files_give_facts_or_an_image_error(sample: bytes, offset: int, damage: bytes, cut: bool) -> None:
    offset %= len(sample)
    data = sample[:offset] + damage + (b"" if cut else sample[offset + len(damage) :])
    try:
        found = facts(data)
    except ImageError as error:
        assert error.param == "image"
    else:
        assert 0 < found.end <= len(data)
