"""The part of an image around its mask, which the model works on alone: box, crop, and place in the whole picture.

Runs in: worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.pixels.frames import size_of
from ovserve.pixels.images import Pixels
from ovserve.settings.options import Resolution

__all__ = ["Region"]


@dataclass(frozen=True, slots=True)
class Region:
    """A box of whole pixels inside a picture. Immutable.

    Attributes:
        whole: size of the picture.
        left, top: of the box, in pixels of the picture.
        size: of the box.
    """

    whole: Resolution
    left: int
    top: int
    size: Resolution

    @classmethod
    def around(cls, mask: Pixels, padding_px: int, shape: Resolution | None = None) -> Region:
        """Return the box around everything that a mask repaints.

        Args:
            mask: uint8 (H, W), not empty.
            padding_px: how far the box extends beyond the mask on each side, as far as the picture goes.
            shape: the box is extended to the aspect ratio of this size, as far as the picture goes; None: it is not.
        """
        whole = size_of(mask)
        across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        left, right = max(0, int(across[0]) - padding_px), min(whole.width, int(across[-1]) + 1 + padding_px)
        top, bottom = max(0, int(down[0]) - padding_px), min(whole.height, int(down[-1]) + 1 + padding_px)
        if shape is not None:
            # Rounded up, so that the box contains the mask and its padding.
            wanted_width = -(-(bottom - top) * shape.width // shape.height)
            wanted_height = -(-(right - left) * shape.height // shape.width)
            left, right = _extend(left, right, wanted_width, whole.width)
            top, bottom = _extend(top, bottom, wanted_height, whole.height)
        return cls(whole, left, top, Resolution(right - left, bottom - top))

    def crop(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return the box of a picture or a mask, as a view."""
        return pixels[self.top : self.top + self.size.height, self.left : self.left + self.size.width]

    def place(self, painted: Pixels) -> Pixels:
        """Return a picture of the whole size, uint8 (H, W, 3), black except for `painted` in the box."""
        placed = np.zeros((self.whole.height, self.whole.width, painted.shape[2]), np.uint8)
        self.crop(placed)[:] = painted
        return placed


def _extend(first: int, last: int, wanted: int, limit: int) -> tuple[int, int]:
    """Return the ends of an interval, extended on both sides to the wanted length, within 0 to `limit`."""
    length = min(limit, max(last - first, wanted))
    first = min(max(0, first - (length - (last - first)) // 2), limit - length)
    return first, first + length
