"""Encoding of a picture before its first step: conditions, encoded image and first latents.

Encoded images are cached by content. Runs in: a slot's thread, with that slot's infer requests.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
import openvino_genai as og

from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.schedulers import Plan
from ovserve.engines.stepwise.cache import ArrayCache, digest
from ovserve.engines.stepwise.compiled import Components, Requests, normalised_levels, run_encoder
from ovserve.engines.stepwise.picture import Blend, Draw, Start, latent_mask
from ovserve.engines.stepwise.prompts import PromptEncoder

__all__ = ["Encoding"]

CACHE_BYTES = 64 * 1024 * 1024  # encoded images; thousands at 512 px, where latents are 1/48 of the image
SEED_RANGE = 2**32  # the library's generator takes seeds of 32 bits

Moments = tuple[Array, ...]


class Encoding:
    """Makes the `Start` of each picture. Thread-safe. Exceptions of infer requests are passed on."""

    def __init__(self, components: Components, prompts: PromptEncoder) -> None:
        self._vae = components.vae
        self._takes_mask = components.family.takes_mask
        self._prompts = prompts
        self._levels = normalised_levels(components.core)
        self._cache = ArrayCache(CACHE_BYTES)

    def start(self, work: Work, plan: Plan, requests: Requests) -> Start:
        """Make the `Start`, with random draws in the library's order: image, noise, masked image."""
        conditions = self._prompts.conditions(work, requests)
        draw = _stream(work.seed)
        inpainting = work.mode == "inpainting"
        from_noise = work.mode == "text2image" or (inpainting and f32(work.strength) == 1)
        image: Array | None = None
        if work.initial_image is not None and not (from_noise and self._takes_mask):
            image = self._sample(self._moments(work.initial_image, None, requests), draw)
        scale = self._vae.scale
        noise = draw((1, self._vae.latent_channels, work.height // scale, work.width // scale))
        latents = noise * plan.init_sigma if from_noise or image is None else plan.add_noise(image, noise, 0)
        if not inpainting or work.mask_image is None or work.initial_image is None:
            return Start(conditions, latents, draw)
        mask = latent_mask(work.mask_image, scale)
        if not self._takes_mask:
            return Start(conditions, latents, draw, blend=Blend(mask, image, noise) if image is not None else None)
        masked = self._sample(self._moments(work.initial_image, work.mask_image, requests), draw)
        return Start(conditions, latents, draw, extra_channels=np.concatenate([mask, masked], axis=1))

    def _moments(self, image: Pixels, mask: Pixels | None, requests: Requests) -> Moments:
        """Return mean and standard deviation of an image's latents, or the latents if the encoder returns these.

        With a mask, the part to repaint is set to zero (mid-gray) before encoding.
        """
        key = (digest(image), None if mask is None else digest(mask))
        found = self._cache.find(key)
        if found is not None:
            return found
        planes = np.ascontiguousarray(self._levels[image].transpose(2, 0, 1)[None])
        if mask is not None:
            planes[:, :, mask >= 128] = 0.0
        moments: Moments = (run_encoder(requests.vae_encoder, planes),)
        if self._vae.samples:
            mean, log_variance = np.split(moments[0], 2, axis=1)
            deviation = np.exp(0.5 * np.clip(log_variance, f32(-30), f32(20)).astype(np.float64)).astype(f32)
            moments = (mean.copy(), deviation)
        self._cache.put(key, moments)
        return moments

    def _sample(self, moments: Moments, draw: Draw) -> Array:
        """Draw from the VAE's posterior, scaled for the UNet: Kingma and Welling 2014, arXiv:1312.6114, section 2.4."""
        drawn = moments[0]
        if len(moments) == 2:
            drawn = drawn + moments[1] * draw(drawn.shape)
        scaled: Array = (drawn - self._vae.shift_factor) * self._vae.scaling_factor
        return scaled


def _stream(seed: int) -> Callable[[tuple[int, ...]], Array]:
    generator = og.CppStdGenerator(seed % SEED_RANGE)

    def draw(shape: tuple[int, ...]) -> Array:
        return np.array(generator.randn_tensor(ov.Shape(shape)).data)

    return draw
