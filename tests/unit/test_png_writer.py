"""PNG files that are written here: any decoder reads the same pixels, and no file is larger than its bound."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ovserve.pixels.png import read_png
from ovserve.pixels.png_writer import png_bound, write_png
from tests.reader import Figure, draw_scene

Pixels = NDArray[np.uint8]


def with_pillow(data: bytes) -> Image.Image:
    """Decode a file after its checksums were verified."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()
    opened = Image.open(io.BytesIO(data), formats=("PNG",))
    opened.load()
    return opened


def usual(pixels: Pixels) -> bytes:
    """Return the file that Pillow makes at its lowest level of compression."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 40),
    channels=st.sampled_from((3, 4)),
    levels=st.sampled_from((1, 2, 3, 17, 256)),
    text=st.text(max_size=300),
    profile=st.binary(max_size=600),
)
@example(width=512, height=512, channels=4, levels=256, text="\U0001f600" * 2000, profile=bytes(range(256)) * 4)
@example(width=1, height=700, channels=3, levels=256, text="", profile=b"")
@example(width=1, height=1, channels=4, levels=256, text="\0", profile=b"\0")
def test_a_decoder_reads_what_was_written_within_the_bound(
    width: int, height: int, channels: int, levels: int, text: str, profile: bytes
) -> None:
    pixels = np.random.default_rng(width).integers(0, levels, (height, width, channels), np.uint8)
    data = write_png(pixels, text, profile)
    image = with_pillow(data)
    assert image.mode == {3: "RGB", 4: "RGBA"}[channels]
    assert np.array_equal(np.asarray(image), pixels)
    written = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    assert image.info.get("parameters", "") == written
    assert image.info.get("icc_profile", b"") == profile
    assert read_png(data).colour_type == {3: 2, 4: 6}[channels]
    bound = png_bound(width, height, channels, text, profile)
    most = 1.2 * width * height * channels + 2 * height + 4 * len(text.encode("utf-8", "replace")) + 4096
    assert len(data) <= bound <= most


def test_rows_use_the_filter_that_fits_them() -> None:
    ramp = np.arange(256, dtype=np.uint8)
    across = np.repeat(ramp[None, :, None], 256, axis=0).repeat(3, axis=2)
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 1), np.uint8)
    columns = np.repeat(noise[:1], 256, axis=0).repeat(3, axis=2)  # equal rows
    rows = np.repeat(noise[:, :1], 256, axis=1).repeat(3, axis=2)  # equal columns
    for pixels in (across, columns, rows, rows[:, ::-1]):
        assert len(write_png(np.ascontiguousarray(pixels))) < 3000  # one filter alone: 30 kB or more for one of them


def test_a_part_of_an_array_is_written_as_seen() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 4), np.uint8)[5:30:2, ::-1, :3]
    assert np.array_equal(np.asarray(with_pillow(write_png(pixels))), pixels)


def test_a_picture_is_smaller_than_with_the_usual_strategy() -> None:
    rows, columns = np.mgrid[0:128, 0:128]
    smooth = np.stack([80 * np.sin(columns / 37), 60 * np.cos((columns + rows) / 53), 20 * np.sin(rows / 7)], axis=-1)
    noise = np.random.default_rng(1).normal(128, 6, smooth.shape)
    pixels: Pixels = (smooth + noise).clip(0, 255).astype(np.uint8)
    assert len(write_png(pixels)) < len(usual(pixels))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(pixels: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        write_png(pixels)


@pytest.mark.parametrize("blur", [0, 3, 20])
def test_a_drawing_is_about_as_small_as_with_all_filters(blur: int) -> None:
    drawing = Image.fromarray(draw_scene("blue", [Figure("red", "circle", 128, 128, 68)], 256)).resize((512, 512))
    pixels = np.asarray(drawing.filter(ImageFilter.GaussianBlur(blur)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    assert len(write_png(pixels)) < 1.1 * len(buffer.getvalue())
