"""Encoding of a picture before its first step: the family makes its start of embeddings, encoded images and noise.

Encoded images are cached by content. Runs in: the thread of a call, with the infer requests of its slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from ovserve.engines.stepwise.prompts import Embedding, PromptEncoder
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

        def embed(index: int, texts: Sequence[str]) -> list[Embedding]:
            with _reported(work, "text"):
                return self._prompts.embed(index, texts, requests, work)

        def moments(image: Pixels, mask: Pixels | None) -> Moments:
            with _reported(work, "encode"):
                return self._moments(image, mask, requests)

        source = Source(vae=self._vae, embed=embed, moments=moments, draw=_stream(work.seed))
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


@contextmanager
def _reported(work: Work, stage: str) -> Iterator[None]:
    """Report the time of a block as a stage of a picture, if it is traced."""
    started_at = time.monotonic()
    yield
    if work.on_span is not None:
        work.on_span(stage, started_at, time.monotonic(), 0)


def _stream(seed: int) -> Callable[[tuple[int, ...]], Array]:
    generator = og.CppStdGenerator(seed % SEED_RANGE)

    def draw(shape: tuple[int, ...]) -> Array:
        return np.array(generator.randn_tensor(ov.Shape(shape)).data)

    return draw
