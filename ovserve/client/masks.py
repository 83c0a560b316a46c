"""Masks that are given as a rectangle: drawn as a picture that is white where to repaint."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, UnidentifiedImageError

__all__ = ["box_mask", "parse_box"]

_SWAPPING = range(5, 9)  # EXIF orientations that exchange width and height (EXIF 2.32, 4.6.4 A)
_ORIENTATION = 0x0112


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Return `X,Y,WIDTH,HEIGHT` as numbers. Raises ValueError."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ValueError(f"{text[:100]!r}: expected X,Y,WIDTH,HEIGHT in pixels, such as 10,10,80,80")
    x, y, width, height = (int(part) for part in parts)
    if not width or not height:
        raise ValueError(f"{text[:100]!r}: width and height must be at least 1")
    return x, y, width, height


def box_mask(picture: bytes, box: tuple[int, int, int, int]) -> bytes:
    """Return a PNG of the picture's size, upright, that is white inside the box.

    Raises:
        ValueError: the picture cannot be read, or the box lies outside it.
    """
    try:
        with Image.open(io.BytesIO(picture)) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _SWAPPING:
                width, height = height, width
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"the picture cannot be read to place the mask: {error}") from None
    x, y, box_width, box_height = box
    if x >= width or y >= height:
        raise ValueError(f"the box begins at {x},{y}, outside the picture of {width}x{height} pixels")
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((x, y, x + box_width - 1, y + box_height - 1), fill=255)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()
