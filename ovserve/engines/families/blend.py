"""Masked edits with a model that takes no mask: after each step the kept part is restored at that step's noise level.

Avrahami et al. 2023, arXiv:2206.02779, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ovserve.engines.protocol import Pixels
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import Plan

__all__ = ["Blend", "latent_mask"]


@dataclass(frozen=True, slots=True)
class Blend:
    """The kept part of one picture. All float32 (1, C, h, w); `mask` (1, 1, h, w): 1 = repaint."""

    mask: Array
    image: Array
    noise: Array

    def at(self, plan: Plan, latents: Array, index: int) -> Array:
        """Return `latents` with the kept part at the noise level of step `index`, or clean after the last step."""
        kept = self.image
        if index < len(plan.timesteps):
            kept = plan.add_noise(self.image, self.noise, index)
        return self.over(kept, latents)

    def over(self, kept: Array, latents: Array) -> Array:
        """Return `latents` where the mask is 1, and `kept` elsewhere."""
        mixed: Array = (f32(1) - self.mask) * kept + self.mask * latents
        return mixed


def latent_mask(mask_image: Pixels, scale: int) -> Array:
    """Return a mask uint8 (H, W) on the latent grid: float32 (1, 1, h, w), 1 = repaint.

    As in the library: threshold at one half, then the first pixel of each cell. Masks are pooled before, so all pixels
    of a cell are equal.
    """
    cells = (mask_image[::scale, ::scale] >= 128).astype(np.float32)
    return cells[None, None]
