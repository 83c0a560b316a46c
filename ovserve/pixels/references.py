"""Fits reference images, which a model sees as conditions: whole, in their own shape, of a limited area.

Runs in: worker.
"""

from __future__ import annotations

import math

from ovserve.pixels.frames import Fitting, size_of
from ovserve.pixels.images import Pixels, flatten
from ovserve.settings.options import Resolution

__all__ = ["HIGH_FIDELITY_PIXELS", "REFERENCE_PIXELS", "fit_reference"]

# A reference adds as many tokens to each step as a picture of its size does; diffusers has the same limit for FLUX.2.
REFERENCE_PIXELS = 1024 * 1024


HIGH_FIDELITY_PIXELS = 2 * REFERENCE_PIXELS  # with input_fidelity=high


def fit_reference(pixels: Pixels, multiple_px: int, limit: int = REFERENCE_PIXELS) -> Pixels:
    """Return an image over white, scaled down to at most `limit` pixels, its edges cut to multiples of `multiple_px`.

    Args:
        pixels: uint8 (H, W, 3) or (H, W, 4).
        multiple_px: both sides of the result, uint8 (h, w, 3), are multiples of this; a smaller side is scaled up.
        limit: area of the result.
    """
    size = size_of(pixels)
    scale = min(1.0, math.sqrt(limit / (size.width * size.height)))

    def fitted(side: int) -> int:
        return max(multiple_px, int(side * scale) // multiple_px * multiple_px)

    target = Resolution(fitted(size.width), fitted(size.height))
    return flatten(Fitting.plan(size, target, "crop").fit_image(pixels))
