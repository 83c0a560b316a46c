"""Encoding of a picture before its first step: the family makes its start of embeddings, encoded images and noise.

Encoded images are cached by content. Runs in: a slot's thread, with that slot's infer requests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import openvino as ov
import openvino_genai as og

from ovserve.engines.families.protocol import Source, Start
from ovserve.engines.families.vae import Moments
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import Plan
from ovserve.engines.stepwise.cache import ArrayCache, digest
from ovserve.engines.stepwise.compiled import Components, Requests, normalised_levels, run_encoder
from ovserve.engines.stepwise.prompts import PromptEncoder
from ovserve.engines.stepwise.tiling import encode_tiles

__all__ = ["Encoding"]

CACHE_BYTES = 64 * 1024 * 1024  # encoded images; thousands at 512 px, where latents are 1/48 of the image
SEED_RANGE = 2**32  # the library's generator takes seeds of 32 bits


class Encoding:
    """Makes the `Start` of each picture. Thread-safe. Exceptions of infer requests are passed on."""

    def __init__(self, components: Components, prompts: PromptEncoder) -> None:
        self._vae = components.vae
        self._family = components.family
        self._prompts = prompts
        self._tiling = components.tiling
        self._levels = normalised_levels(components.core)
        self._cache = ArrayCache(CACHE_BYTES)

    def start(self, work: Work, plan: Plan, requests: Requests) -> Start:
        """Make the `Start` of a picture."""
        source = Source(
            vae=self._vae,
            embed=lambda index, texts: self._prompts.embed(index, texts, requests, work),
            moments=lambda image, mask: self._moments(image, mask, requests),
            draw=_stream(work.seed),
        )
        return self._family.start(work, plan, source)

    @property
    def lookups(self) -> tuple[int, int]:
        """How many images were found in the cache, and how many were not."""
        return self._cache.hits, self._cache.misses

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
        encoded = encode_tiles(partial(run_encoder, requests.vae_encoder), planes, self._tiling)
        moments: Moments = (encoded,)
        if self._vae.samples:
            mean, log_variance = np.split(moments[0], 2, axis=1)
            deviation = np.exp(0.5 * np.clip(log_variance, f32(-30), f32(20)).astype(np.float64)).astype(f32)
            moments = (mean.copy(), deviation)
        self._cache.put(key, moments)
        return moments


def _stream(seed: int) -> Callable[[tuple[int, ...]], Array]:
    generator = og.CppStdGenerator(seed % SEED_RANGE)

    def draw(shape: tuple[int, ...]) -> Array:
        return np.array(generator.randn_tensor(ov.Shape(shape)).data)

    return draw
