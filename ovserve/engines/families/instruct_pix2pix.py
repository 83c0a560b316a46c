"""InstructPix2Pix: Stable Diffusion that sees the image in further channels of its UNet; three rows, two scales.

Brooks et al. 2023, arXiv:2211.09800. The image's latents are its mean, not scaled, as the models were trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.protocol import Conditions, Context, Encode, Source, Start
from ovserve.engines.families.stable_diffusion import StableDiffusion
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import Plan
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["InstructPix2Pix"]

ROWS = 3  # without both, with the image, with image and prompt


class TwoScaleGuidance(RowGuidance):
    """Guidance by the prompt and by the image: arXiv:2211.09800, equation 3."""

    def rows(self, work: Work) -> int:
        """Return 3 where guidance has an effect, else 1."""
        return ROWS if work.guidance_scale > 1 and work.request.image_guidance_scale >= 1 else 1

    def combine(self, predictions: Sequence[Array], work: Work) -> tuple[Array, Array]:
        """Return the guided prediction, and how far it is from that of the last row."""
        neither, image, both = predictions
        by_text, by_image = f32(work.guidance_scale), f32(work.request.image_guidance_scale)
        guided: Array = neither + by_text * (both - image) + by_image * (image - neither)
        return guided, guided - both

    def reuse(self, given: Array, difference: Array, work: Work) -> Array:  # noqa: ARG002 - of the protocol
        """Return the prediction of the last row and the distance of an earlier step."""
        guided: Array = given + difference
        return guided


class InstructPix2Pix(StableDiffusion):
    """The protocol `Family`.

    Raises:
        ModelError: unet/config.json cannot be read.
    """

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        self.guidance = TwoScaleGuidance()

    def check_channels(self, latent_channels: int) -> None:
        """Check that the UNet takes latents and the image's latents.

        Raises:
            ModelError: it takes another number of channels.
        """
        if self.channels != 2 * latent_channels:
            raise ModelError(f"unet: in_channels is {self.channels}; expected {2 * latent_channels}")

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the hidden states of the prompts: the negative one for the first two rows."""
        rows = self.guidance.rows(work)
        prompts = [work.negative_prompt] * (rows - 1) + [work.prompt]
        return Conditions({"encoder_hidden_states": np.stack([found[0] for found in embed(0, prompts)])}, rows)

    def start(self, work: Work, plan: Plan, source: Source) -> Start:
        """Start from noise, beside the image's latents; the first row sees zeros instead of them."""
        conditions = self.conditions(work, source.embed)
        if work.initial_image is None:
            raise ValueError("this model edits an image; it makes none from text alone")
        vae = source.vae
        noise = source.draw((1, vae.latent_channels, work.height // vae.scale, work.width // vae.scale))
        image = source.moments(work.initial_image, None)[0]
        channels = np.concatenate([image] * conditions.rows)
        if conditions.rows == ROWS:
            channels[0] = 0
        latents = noise * plan.init_sigma
        return Start(conditions, latents, source.draw, context=Context(channels, layout="image"))
