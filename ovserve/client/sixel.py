"""Pictures as sixels, the picture format of DEC's VT340 terminal, which several terminals of today show.

Each character is a column of six pixels of one colour: DEC, VT330/VT340 Programmer Reference Manual, volume 2, chapter
14.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["MAX_HEIGHT_PX", "MAX_WIDTH_PX", "sixels"]

MAX_WIDTH_PX, MAX_HEIGHT_PX = 720, 360  # of a shown picture: 18 rows of a usual font
_MAX_PIXELS = 1 << 26  # of a picture that is decoded; a server could send one that never ends
_COLOURS = 255  # registers that every terminal has, and one for its background
_BAND_PX = 6
_FIRST = 63  # the character of an empty column: `?`


def sixels(content: bytes) -> Iterator[str]:
    """Yield the escape sequence that shows an encoded picture; nothing if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                return
            opened.thumbnail((MAX_WIDTH_PX, MAX_HEIGHT_PX))
            image = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):  # what Pillow raises
        return
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    indexed = flat.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
    pixels = np.asarray(indexed, np.uint8)
    palette = np.asarray(indexed.getpalette(), np.int64).reshape(-1, 3)
    used = np.unique(pixels)
    yield f'\x1bP0;1q"1;1;{indexed.width};{indexed.height}'
    yield "".join(f"#{index};2;" + ";".join(map(str, palette[index] * 100 // 255)) for index in used)
    for top in range(0, len(pixels), _BAND_PX):
        yield "$".join(_lines(pixels[top : top + _BAND_PX])) + "-"
    yield "\x1b\\\n"


def _lines(band: NDArray[np.uint8]) -> Iterator[str]:
    """Yield the columns of each colour of a band of at most six rows."""
    weights = (1 << np.arange(len(band), dtype=np.int64))[:, None]
    for colour in np.unique(band):
        columns = ((band == colour) * weights).sum(axis=0)
        ends = np.flatnonzero(np.diff(columns, append=-1))
        counts = np.diff(ends, prepend=-1)
        runs = (_run(int(columns[end]), int(count)) for end, count in zip(ends, counts, strict=True))
        yield f"#{colour}" + "".join(runs)


def _run(column: int, count: int) -> str:
    """Return equal columns; more than three are written once, with their number."""
    character = chr(_FIRST + column)
    return character * count if count <= 3 else f"!{count}{character}"
