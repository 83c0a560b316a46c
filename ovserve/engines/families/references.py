"""Families that edit by reference: the images are further tokens of the transformer, and the picture starts from noise.

With a mask, the part outside it is kept by blending the edited image in after each step.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from ovserve.engines.families.blend import Blend, latent_mask
from ovserve.engines.families.packing import PATCH, grid, pack
from ovserve.engines.families.protocol import Conditions, Context, Source, Start
from ovserve.engines.families.transformer import PackedTransformer
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.schedulers.plans import Plan

__all__ = ["ReferenceTransformer", "references_of"]


def references_of(work: Work) -> tuple[Pixels, ...]:
    """Return the reference images of a picture, the edited one first."""
    if work.reference_images or work.initial_image is None:
        return work.reference_images
    return (work.initial_image,)


class ReferenceTransformer(PackedTransformer):
    """A packed transformer that takes reference images."""

    def start(self, work: Work, plan: Plan, source: Source) -> Start:  # noqa: ARG002
        """Start from noise, beside the tokens of the references; an image's latents are the mean, so none is drawn."""
        conditions = self.conditions(work, source.embed)
        noise = source.draw(self.noise_shape(work, source))
        context = self.context_of(references_of(work), conditions, source)
        blend = None
        if work.mask_image is not None and work.initial_image is not None:
            kept = self.encode(work.initial_image, source)
            blend = Blend(latent_mask(work.mask_image, source.vae.scale), kept, noise)
        return Start(conditions, noise, source.draw, blend, context)

    def context_of(self, images: tuple[Pixels, ...], conditions: Conditions, source: Source) -> Context:
        """Return the tokens of the references and their positions."""
        encoded = [self.encode(image, source) for image in images]
        sizes = tuple((latents.shape[2] // PATCH, latents.shape[3] // PATCH) for latents in encoded)
        layout: Hashable = (self.layout_of(conditions), sizes)
        if not encoded:
            return Context(layout=layout)
        tokens = np.concatenate([pack(latents) for latents in encoded], axis=1)
        places = [grid(self.reference_position(index), *size, self.position_axes) for index, size in enumerate(sizes)]
        return Context(tokens=tokens, positions=np.concatenate(places)[None], layout=layout)

    def encode(self, image: Pixels, source: Source) -> Array:
        """Return the mean latents of an image."""
        vae = source.vae
        scaled: Array = (source.moments(image, None)[0] - vae.shift_factor) * vae.scaling_factor
        return scaled

    def reference_position(self, index: int) -> int:
        """Return the first coordinate of the tokens of reference `index`; the picture's own have 0."""
        raise NotImplementedError
