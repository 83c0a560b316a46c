"""Read pictures of things: which background, which thing, and where. The judge of the world "things".

It shares nothing with the model: a crop is compared with drawings of all things, at one size and on the same ground.
Coordinates are pixels of the picture, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from scripts.builtin_model.thing_scenes import COLOURS, LANDSCAPES, PICTURE_PX, Sprites, draw_backdrop

__all__ = ["Judge", "Seen", "parts_of"]

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

_RIM_PX = 6  # the border whose colours decide the background
_FOREGROUND_MIN = 36.0  # Euclidean RGB distance from the background above which a pixel belongs to a thing
_SPECK_PX = 2  # rows and columns with fewer pixels of a thing do not widen its box
_SOFT_PX = 13  # width of a soft edge in a landscape; odd
_INSETS_PX = (0, 2, 4, 6)
_SIDE_PX = 32  # of the crops that are compared
_DRAWN_PX = 128  # side of the drawings for the comparison
_GROUND = 128  # level of the ground behind compared crops


@dataclass(frozen=True, slots=True)
class Seen:
    """A thing as it was read.

    Attributes:
        name: the most similar thing.
        distance: root mean square difference of the levels to its drawing, 0..255; below 15 for most clean drawings.
        margin: how much more the second most similar thing differs, in the same unit.
        x, y: centre of its box in pixels.
        area: number of its pixels.
    """

    name: str
    distance: float
    margin: float
    x: float
    y: float
    area: int


class Judge:
    """Reads pictures.

    Args:
        sprites: drawings of all known things.
    """

    def __init__(self, sprites: Sprites) -> None:
        self._sprites = sprites
        self._templates: dict[str, npt.NDArray[np.float32]] = {}

    def read_background(self, picture: Pixels) -> str:
        """Return the most similar background: a key of COLOURS, or one of LANDSCAPES."""
        seen = _rim(picture)
        distances = {name: _rim_distance(seen, _rim(draw_backdrop(name))) for name in (*COLOURS, *LANDSCAPES)}
        return min(distances, key=distances.__getitem__)

    def foreground(self, picture: Pixels) -> Mask:
        """Return the pixels that differ from the background, bool (H, W)."""
        name = self.read_background(picture)
        seen = picture.astype(np.float32)
        if name in COLOURS:  # a plain background may be somewhat lighter or darker than its colour
            behind = np.median(_rim(picture), axis=0)
        else:
            low, high = _levels_around(name)
            behind = seen.clip(low, high)
        return np.sqrt(np.square(seen - behind).sum(axis=-1)) > _FOREGROUND_MIN

    def read_thing(self, picture: Pixels, columns: slice = slice(None)) -> Seen | None:
        """Return the thing in these columns of a picture; None if there is hardly anything."""
        background = self.read_background(picture)
        mask = np.zeros(picture.shape[:2], np.bool_)
        mask[:, columns] = self.foreground(picture)[:, columns]
        box = _box(mask)
        if box is None:
            return None
        known = self._known(background)
        crops = (_normalised(picture, mask, smaller) for smaller in _inset(box))
        distances = np.min([np.sqrt(np.square(known - crop).mean(axis=(1, 2, 3))) for crop in crops], axis=0)
        first, second = np.argsort(distances)[:2]
        rows, across = box
        return Seen(
            name=self._sprites.names[int(first)],
            distance=float(distances[first]),
            margin=float(distances[second] - distances[first]),
            x=(across.start + across.stop) / 2,
            y=(rows.start + rows.stop) / 2,
            area=int(mask.sum()),
        )

    def _known(self, background: str) -> npt.NDArray[np.float32]:
        """Return the crops of all things as they are seen on a background: float32 (N, side, side, 3).

        In a landscape the ground differs from place to place, so there the crops are those on a ground that differs
        from every thing.
        """
        key = background if background in COLOURS else ""
        if key not in self._templates:
            self._templates[key] = np.stack([self._template(name, key) for name in self._sprites.names])
        return self._templates[key]

    def _template(self, name: str, background: str) -> npt.NDArray[np.float32]:
        drawing = self._sprites.scaled(name, _DRAWN_PX)
        alpha = drawing[..., 3:].astype(np.float32) / 255
        if not background:
            behind, mask = np.full(3, _GROUND, np.float32), drawing[..., 3] > 127
        else:
            behind = np.array(COLOURS[background], np.float32)
        picture = (drawing[..., :3] * alpha + behind * (1 - alpha)).round().astype(np.uint8)
        if background:
            mask = np.sqrt(np.square(picture - behind).sum(axis=-1)) > _FOREGROUND_MIN
        box = _box(mask) or (slice(0, _DRAWN_PX), slice(0, _DRAWN_PX))
        return _normalised(picture, mask, box)


def parts_of(count: int) -> list[slice]:
    """Return the columns of each of `count` things side by side."""
    return [slice(PICTURE_PX * i // count, PICTURE_PX * (i + 1) // count) for i in range(count)]


@cache
def _levels_around(landscape: str) -> tuple[Pixels, Pixels]:
    """Return the lowest and highest levels near each pixel of a landscape: a model draws its edges softly."""
    image = Image.fromarray(draw_backdrop(landscape))
    return np.asarray(image.filter(ImageFilter.MinFilter(_SOFT_PX))), np.asarray(
        image.filter(ImageFilter.MaxFilter(_SOFT_PX))
    )


def _rim(picture: Pixels) -> Pixels:
    """Return the pixels of the border, always in the same order: (N, 3)."""
    width = _RIM_PX
    sides = (picture[:width], picture[-width:], picture[:, :width], picture[:, -width:])
    return np.concatenate([side.reshape(-1, 3) for side in sides])


def _rim_distance(seen: Pixels, known: Pixels) -> float:
    """Return how far the border differs from a background. A thing may cover up to a third of it."""
    distances = np.sqrt(np.square(seen.astype(np.float32) - known).sum(axis=-1))
    return float(np.sort(distances)[: len(distances) * 2 // 3].mean())


def _box(mask: Mask) -> tuple[slice, slice] | None:
    """Return the rows and columns of the pixels, without specks; None if there are hardly any."""
    rows, columns = (np.flatnonzero(mask.sum(axis=axis) > _SPECK_PX) for axis in (1, 0))
    if len(rows) < PICTURE_PX // 24 or len(columns) < PICTURE_PX // 24:
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _inset(box: tuple[slice, slice]) -> list[tuple[slice, slice]]:
    """Return the box, and smaller ones: a soft outline widens the box of a thing by some pixels on each side."""
    least = min(side.stop - side.start for side in box)
    insets = [inset for inset in _INSETS_PX if least > 6 * inset]
    return [(slice(r.start + i, r.stop - i), slice(c.start + i, c.stop - i)) for i in insets for r, c in [box]]


def _normalised(picture: Pixels, mask: Mask, box: tuple[slice, slice]) -> npt.NDArray[np.float32]:
    """Return a box centred in a square of _SIDE_PX, on an even ground: float32 (_SIDE_PX, _SIDE_PX, 3)."""
    cut = np.where(mask[..., None], picture, np.uint8(_GROUND))[box]
    height, width = cut.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), _GROUND, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = cut
    scaled = Image.fromarray(square).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32)
