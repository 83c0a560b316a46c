"""Decodes and encodes large pictures in tiles, so that the VAE's memory does not grow with the picture.

The VAE's memory grows with the area, and its attention with the square of the area. A tile sees only its own part, and
its normalisation differs a little from that of the whole picture: neighbouring tiles overlap, and the result changes
from one to the other over the whole overlap, so that no seam is left. Runs in: the thread of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.schedulers.noise import Array

__all__ = ["Tiling", "decode_tiles", "encode_tiles"]

OVERLAP = 1 / 4  # of a tile's side; a ramp of many pixels keeps the change between neighbours below one level
LARGE = 2  # tiles' areas from which on a picture is large
MARGIN = 1 / 6  # of an overlap at each of its ends: there only one of the two tiles counts
_SMALLEST = 1e-6  # weight: the sum of all is above 0
_MIN_CELLS = 8  # side of a tile in latents


@dataclass(frozen=True, slots=True)
class Tiling:
    """The size of the tiles.

    Attributes:
        cells: side of a tile in cells of latents; 0: never in tiles.
        scale: side of the pixels of one cell.
    """

    cells: int
    scale: int

    @classmethod
    def of(cls, tile_px: int, scale: int) -> Tiling:
        """Return the tiling for a side in pixels, as the option gives it; 0 for none."""
        return cls(max(_MIN_CELLS, tile_px // scale // 2 * 2) if tile_px else 0, scale)

    def is_large(self, height: int, width: int) -> bool:
        """Return whether latents of this size are decoded in tiles."""
        return bool(self.cells) and height * width > LARGE * self.cells**2


@dataclass(frozen=True, slots=True)
class _Span:
    """One tile along one axis: cells from `begin` to `end`.

    Attributes:
        begin, end: the cells.
        overlap: number of cells that two neighbours share.
        rises, falls: whether there is a neighbour before it, and after it.
    """

    begin: int
    end: int
    overlap: int
    rises: bool
    falls: bool

    def place(self, scale: int) -> slice:
        """Return the span in pixels, `scale` to a cell."""
        return slice(self.begin * scale, self.end * scale)

    def weights(self, scale: int) -> Array:
        """Return a weight for each pixel, `scale` to a cell: 1, and a ramp over each overlap.

        A tile's border is distorted by the padding of the VAE's convolutions: near it the weight is almost 0.
        """
        count, ramp = (self.end - self.begin) * scale, self.overlap * scale
        margin = MARGIN * ramp
        rising = np.clip((np.arange(count) + 0.5 - margin) / (ramp - 2 * margin), _SMALLEST, 1.0)
        found = np.ones(count)
        if self.rises:
            found = np.minimum(found, rising)
        if self.falls:
            found = np.minimum(found, rising[::-1])
        return found.astype(np.float32)


def decode_tiles(decode: Callable[[Array], NDArray[np.uint8]], latents: Array, tiling: Tiling) -> NDArray[np.uint8]:
    """Decode latents (1, C, h, w) to pixels uint8 (H, W, 3), in tiles where they are large.

    Args:
        decode: decodes latents (1, C, h, w) to uint8 (H, W, 3).
        latents: the latents.
        tiling: the size of the tiles.
    """
    height, width = latents.shape[2:]
    if not tiling.is_large(height, width):
        return decode(latents)
    total = weight = np.zeros(0, np.float32)
    for down, across in _tiles(height, width, tiling.cells):
        tile = decode(np.ascontiguousarray(latents[:, :, down.begin : down.end, across.begin : across.end]))
        scale = tile.shape[0] // (down.end - down.begin)
        if not total.size:
            total = np.zeros((height * scale, width * scale, 3), np.float32)
            weight = np.zeros((height * scale, width * scale, 1), np.float32)
        share = np.outer(down.weights(scale), across.weights(scale))[..., None]
        place = (down.place(scale), across.place(scale))
        total[place] += share * tile
        weight[place] += share
    pixels: NDArray[np.uint8] = np.rint(total / weight).astype(np.uint8)
    return pixels


def encode_tiles(encode: Callable[[Array], Array], image: Array, tiling: Tiling) -> Array:
    """Encode an image float32 (1, 3, H, W) to latents or their moments (1, C, h, w), in tiles where it is large.

    Args:
        encode: encodes an image (1, 3, H, W) to (1, C, h, w).
        image: the image; both sides are multiples of the scale.
        tiling: the size of the tiles.
    """
    scale = tiling.scale
    height, width = image.shape[2] // scale, image.shape[3] // scale
    if not tiling.is_large(height, width):
        return encode(image)
    total = weight = np.zeros(0, np.float32)
    for down, across in _tiles(height, width, tiling.cells):
        tile = encode(np.ascontiguousarray(image[:, :, down.place(scale), across.place(scale)]))
        if not total.size:
            total = np.zeros((*tile.shape[:2], height, width), np.float32)
            weight = np.zeros((height, width), np.float32)
        share = np.outer(down.weights(1), across.weights(1))
        total[:, :, down.place(1), across.place(1)] += share * tile
        weight[down.place(1), across.place(1)] += share
    latents: Array = (total / weight).astype(np.float32)
    return latents


def _tiles(height: int, width: int, cells: int) -> Iterator[tuple[_Span, _Span]]:
    """Yield the tiles of a picture by rows: the span down, and the span across."""
    yield from product(_spans(height, cells), _spans(width, cells))


def _spans(length: int, cells: int) -> list[_Span]:
    """Return spans of at most `cells` that cover an axis evenly, and overlap by about OVERLAP of a tile."""
    if length <= cells:
        return [_Span(0, length, 1, rises=False, falls=False)]
    overlap = max(2, round(cells * OVERLAP))
    count = -(-(length - overlap) // (cells - overlap))
    side = min(cells, -(-(length + (count - 1) * overlap) // count))  # no larger than needed
    begins = np.rint(np.linspace(0, length - side, count)).astype(int).tolist()
    return [
        _Span(begin, begin + side, overlap, rises=number > 0, falls=number < count - 1)
        for number, begin in enumerate(begins)
    ]
