"""An image's own transparent pixels as a mask: which pixels are repainted, how much, and the colour they get before.

An image without a mask, of which some pixel is mostly transparent, is repainted by 1 - alpha / 255: a hard hole
wholly, the rim of a soft eraser in part. A nearly opaque pixel counts as opaque, because lossy editors leave such
alphas over a whole picture. The colour stored under alpha 0 is arbitrary, often white or black, so it is never used.
Runs in: worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.pixels.images import Pixels, has_alpha

__all__ = ["HOLE_ALPHA", "OPAQUE_ALPHA", "fill_holes", "join_alpha", "mask_from_alpha", "settle_alpha"]

HOLE_ALPHA = 128  # an alpha plane is a mask only if at least one of its pixels is below this
OPAQUE_ALPHA = 250  # pixels from this alpha on count as opaque
_MIDDLE_LEVEL = 127.5  # colour of an image without any colour: all its pixels have alpha 0


def settle_alpha(pixels: Pixels) -> Pixels:
    """Return the image with alpha 255 for every pixel that counts as opaque; the same array if nothing changes."""
    if not has_alpha(pixels):
        return pixels
    nearly = (pixels[..., 3] >= OPAQUE_ALPHA) & (pixels[..., 3] < 255)
    if not nearly.any():
        return pixels
    settled = pixels.copy()
    settled[nearly, 3] = 255
    return settled


def mask_from_alpha(pixels: Pixels) -> Pixels | None:
    """Return the mask of an image's own transparent pixels: 255 where alpha is below OPAQUE_ALPHA, else 0.

    None if no pixel is below HOLE_ALPHA: the image is not meant as a mask.
    """
    if not has_alpha(pixels) or pixels[..., 3].min() >= HOLE_ALPHA:
        return None
    return np.where(pixels[..., 3] < OPAQUE_ALPHA, 255, 0).astype(np.uint8)


def fill_holes(pixels: Pixels) -> Pixels:
    """Return RGB: the image over a smooth picture of the colours around its transparent pixels. No white, no black.

    That picture has the mean colour, weighted by alpha, of blocks of 2, 4, 8, ... pixels, up to a block that is opaque
    in sum (the "pull" and "push" of Gortler et al. 1996, The Lumigraph, section 3.4).
    """
    if not has_alpha(pixels):
        return pixels
    colour, alpha = np.ascontiguousarray(pixels[..., :3]), pixels[..., 3]
    rows, columns = np.nonzero(alpha < 255)
    if not rows.size:
        return colour
    weighted = colour.astype(np.uint16) * alpha[..., None]
    level = np.float32(255)
    below = _spread(_sum_blocks(weighted) / level, _sum_blocks(alpha[..., None]) / level)[rows // 2, columns // 2]
    share = alpha[rows, columns, None].astype(np.float32) / 255
    filled = colour.copy()
    filled[rows, columns] = (colour[rows, columns] * share + below * (1 - share) + 0.5).astype(np.uint8)
    return filled


def join_alpha(colour: Pixels, alpha: Pixels) -> Pixels:
    """Return RGBA of uint8 (H, W, 3) and uint8 (H, W)."""
    return np.dstack([colour, alpha])


def _spread(colour: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a colour for every pixel: its own as far as it is opaque, else that of the block of 2x2 pixels around it.

    Args:
        colour: float32 (H, W, 3), multiplied by the weight.
        weight: float32 (H, W, 1), 0 to 4: the opacity, which counts as 1 if it is more.
    """
    excess: NDArray[np.float32] = np.maximum(weight, np.float32(1))
    colour, weight = colour / excess, weight / excess
    if max(weight.shape[:2]) == 1:
        return np.divide(colour, weight, out=np.full_like(colour, _MIDDLE_LEVEL), where=weight > 0)
    height, width = weight.shape[:2]
    coarse = _spread(_sum_blocks(colour), _sum_blocks(weight))
    return colour + (np.float32(1) - weight) * coarse.repeat(2, 0)[:height].repeat(2, 1)[:, :width]


def _sum_blocks(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return the sums of blocks of 2x2 pixels; a block at the right or lower edge may be cut."""
    height, width = values.shape[:2]
    total = np.zeros(((height + 1) // 2, (width + 1) // 2, values.shape[2]), np.float32)
    for down in (0, 1):
        for across in (0, 1):
            part = values[down::2, across::2]
            total[: part.shape[0], : part.shape[1]] += part
    return total
