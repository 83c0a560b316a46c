"""Pictures as sixels: a small terminal of our own shows what was sent."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ovserve.client.sixel import MAX_HEIGHT_PX, MAX_WIDTH_PX, sixels
from ovserve.client.terminal import shown_picture
from tests.pictures import image_of


def shown(text: str) -> NDArray[np.uint8]:
    """Return the picture that a terminal shows: RGB."""
    match = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\\n', text, re.DOTALL)
    assert match
    width, height = int(match[1]), int(match[2])
    screen = np.zeros((height + 6, width, 3), np.uint8)
    palette: dict[int, tuple[int, ...]] = {}
    x = top = colour = 0
    token = re.compile(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])")
    position = 0
    while position < len(match[3]):
        found = token.match(match[3], position)
        assert found, match[3][position : position + 20]
        position = found.end()
        if found[1]:
            palette[int(found[1])] = tuple(round(int(found[k]) * 255 / 100) for k in (2, 3, 4))
        elif found[5]:
            colour = int(found[5])
        elif found[9]:
            x = 0
            top += 6 if found[9] == "-" else 0
        else:
            count, bits = int(found[6] or 1), ord(found[7] or found[8]) - 63
            assert x + count <= width
            for row in range(6):
                if bits >> row & 1:
                    screen[top + row, x : x + count] = palette[colour]
            x += count
    assert not screen[height:].any()
    return screen[:height]


def png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 48), (8, 8), (72, 40)])
def test_terminal_shows_the_picture(width: int, height: int) -> None:
    pixels = image_of(width, height, 1)
    found = shown("".join(sixels(png(pixels))))
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).max() <= 4  # percent instead of levels


def test_large_picture_is_made_smaller_with_its_shape() -> None:
    found = shown("".join(sixels(png(image_of(1600, 400, 2)))))
    assert found.shape[:2] == (MAX_WIDTH_PX // 4, MAX_WIDTH_PX)
    assert found.shape[0] <= MAX_HEIGHT_PX


def test_transparent_parts_are_white() -> None:
    pixels = np.zeros((12, 12, 4), np.uint8)
    assert (shown("".join(sixels(png(pixels)))) == 255).all()


def test_what_is_no_picture_is_not_shown() -> None:
    assert list(sixels(b"RIFF")) == []
    assert list(sixels(png(image_of(64, 64))[:100])) == []
    huge = bytearray(png(image_of(8, 8)))
    huge[16:24] = (20_000).to_bytes(4, "big") * 2  # the size in IHDR: Pillow refuses it by an error of its own
    assert list(sixels(bytes(huge))) == []
    assert list(shown_picture(b"RIFF", "sixel")) == []
    assert "".join(shown_picture(png(image_of(8, 8)), "sixel")).startswith("\x1bP")
