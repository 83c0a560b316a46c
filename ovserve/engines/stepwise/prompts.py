"""The text side of a model: tokens and text embeddings, cached; the family makes conditions of them.

Thread-safe. Runs in: slot threads (`conditions`); any thread (the rest).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino_genai as og
from numpy.typing import NDArray

from ovserve.engines.families.configs import component_config
from ovserve.engines.families.protocol import Conditions, Family
from ovserve.engines.protocol import Work, truncate_to_window
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.stepwise.cache import ArrayCache
from ovserve.engines.stepwise.compiled import Requests
from ovserve.engines.stepwise.lora import Loras, Weights, with_weights
from ovserve.models.profile import ModelProfile

__all__ = ["PromptEncoder"]


TOKEN_CACHE_BYTES = 1024 * 1024  # thousands of prompts of ordinary length
CACHE_BYTES = 64 * 1024 * 1024  # about a hundred prompts of SDXL (77 x 2048 floats), thousands of smaller models


class _Encoder:
    """One tokenizer, the window of its text encoder, and the outputs of it that make an embedding."""

    def __init__(self, family: Family, directory: Path, index: int, window: int) -> None:
        suffix = "" if index == 0 else f"_{index + 1}"
        self.name = f"text_encoder{suffix}"
        config = component_config(directory / self.name)
        self._tokenizer = og.Tokenizer(str(directory / f"tokenizer{suffix}"))
        self.window = int(config.get("max_position_embeddings") or window)
        self.outputs = family.embedding_outputs(config)
        self._padding = self._tokenizer.get_pad_token_id()
        self._cache = ArrayCache(TOKEN_CACHE_BYTES)

    def tokens(self, prompt: str) -> NDArray[np.int64]:
        """Return all tokens of a prompt. Cached: the prepare thread counts them before a slot encodes them."""
        found = self._cache.find(prompt)
        if found is None:
            found = (np.array(self._tokenizer.encode(prompt).input_ids.data, np.int64).ravel(),)
            self._cache.put(prompt, found)
        return found[0]

    def ids(self, prompt: str) -> NDArray[np.int64]:
        """Return the tokens cut or padded to the window, as in the library: a cut prompt gets no end token."""
        padded = np.full(self.window, self._padding, np.int64)
        found = self.tokens(prompt)[: self.window]
        padded[: found.size] = found
        return padded


class PromptEncoder:
    """The tokenizers of a model, and a cache of embeddings by prompt."""

    def __init__(self, profile: ModelProfile, family: Family, loras: Loras) -> None:
        self._family = family
        self._loras = loras
        self._encoders = [
            _Encoder(family, profile.directory, index, profile.prompt_tokens) for index in range(profile.text_encoders)
        ]
        self._cache = ArrayCache(CACHE_BYTES)

    def count_tokens(self, prompt: str) -> int:
        """Count all tokens of a prompt, special tokens included."""
        return len(self._encoders[0].tokens(prompt))

    def cut_prompt(self, prompt: str) -> str:
        """Return the longest prefix of a prompt that fits the window."""
        return truncate_to_window(prompt, self.count_tokens, self._encoders[0].window)

    def conditions(self, work: Work, requests: Requests) -> Conditions:
        """Return the conditions of a picture, from the cache or the text encoders in `requests`."""

        def encode(index: int, prompts: Sequence[str]) -> list[tuple[Array, ...]]:
            return self._encode(index, prompts, requests, self._loras.weights(work, self._encoders[index].name))

        return self._family.conditions(work, encode)

    def _encode(
        self, index: int, prompts: Sequence[str], requests: Requests, weights: Weights
    ) -> list[tuple[Array, ...]]:
        """Return each prompt's embedding by one encoder: the outputs that the family names, without the batch axis.

        The weights of the adapters that change the encoder are part of the cache's key.
        """
        missing = [p for p in dict.fromkeys(prompts) if self._cache.find((index, weights, p)) is None]
        fresh: dict[str, tuple[Array, ...]] = {}
        if missing:
            encoder = self._encoders[index]
            request, inputs = requests.text_encoders[index], {0: np.stack([encoder.ids(prompt) for prompt in missing])}
            if weights:
                request = requests.adapted[encoder.name]
                inputs = with_weights(inputs, self._loras.rows([weights] * len(missing)))
            request.infer(inputs)
            found = [np.array(request.get_output_tensor(place).data) for place in encoder.outputs]
            for row, prompt in enumerate(missing):
                fresh[prompt] = tuple(array[row].copy() for array in found)
                self._cache.put((index, weights, prompt), fresh[prompt])
        return [fresh[p] if p in fresh else self._cached(index, p, requests, weights) for p in prompts]

    def _cached(self, index: int, prompt: str, requests: Requests, weights: Weights) -> tuple[Array, ...]:
        cached = self._cache.find((index, weights, prompt))
        # None: evicted a moment ago.
        return cached if cached is not None else self._encode(index, [prompt], requests, weights)[0]
