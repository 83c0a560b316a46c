"""The text side of a model: tokens and text embeddings, cached; the family makes conditions of them.

Thread-safe. Runs in: the thread of a call (`embed`); any thread (the rest).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as og
from numpy.typing import NDArray

from ovserve.engines.families.protocol import Family
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.protocol import Work, truncate_to_window
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.stepwise.cache import ArrayCache
from ovserve.engines.stepwise.compiled import Requests
from ovserve.engines.stepwise.lora import Loras, Weights, with_weights
from ovserve.engines.stepwise.on_demand import OnDemand
from ovserve.models.profile import ModelProfile

__all__ = ["Embedding", "PromptEncoder"]


TOKEN_CACHE_BYTES = 1024 * 1024  # thousands of prompts of ordinary length
CACHE_BYTES = 64 * 1024 * 1024  # about a hundred prompts of SDXL (77 x 2048 floats), thousands of smaller models
# A prompt of a large transformer takes 4 to 25 MB (FLUX.2 klein: 512 x 7680 or 512 x 12288 floats). The limit rises
# with the size of the model's embeddings, which is small beside that of such a model's weights.
CACHE_PROMPTS = 16
MAX_CACHE_BYTES = 512 * 1024 * 1024

Embedding = tuple[NDArray[Any], ...]


class _Encoder:
    """One tokenizer, and how the family uses the text encoder behind it."""

    def __init__(self, directory: Path, text: TextEncoder) -> None:
        self.text = text
        # With more threads, a tokenizer takes no less time and more than twice the CPU (measured).
        self._tokenizer = og.Tokenizer(str(directory / text.tokenizer), INFERENCE_NUM_THREADS=1)
        self._padding = self._tokenizer.get_pad_token_id()
        self._cache = ArrayCache(TOKEN_CACHE_BYTES)

    def tokens(self, prompt: str) -> NDArray[np.int64]:
        """Return all tokens of a prompt. Cached: the prepare thread counts them before a slot encodes them."""
        found = self._cache.find(prompt)
        if found is None:
            found = (np.array(self._tokenizer.encode(self._templated(prompt)).input_ids.data, np.int64).ravel(),)
            self._cache.put(prompt, found)
        return found[0]

    def _templated(self, prompt: str) -> str:
        text = self.text
        if text.chat is None:
            return text.prefix + prompt + text.suffix
        turn = [{"role": "user", "content": prompt}]
        return str(self._tokenizer.apply_chat_template(turn, True, extra_context=dict(text.chat)))

    def count(self, prompt: str) -> int:
        """Return how many tokens of the window a prompt takes."""
        return len(self.tokens(prompt)) - self.text.skipped

    def feed(self, prompts: Sequence[str]) -> dict[Any, NDArray[np.int64]]:
        """Return the encoder's inputs for prompts, cut to the window; more than one only if the encoder pads them.

        A cut prompt gets no end token, as in the library.
        """
        window = self.text.window + self.text.skipped
        found = [self.tokens(prompt)[:window] for prompt in prompts]
        length = window if self.text.is_padded else len(found[0])
        ids = np.full((len(found), length), self._padding, np.int64)
        mask = np.zeros((len(found), length), np.int64)
        for row, tokens in enumerate(found):
            ids[row, : tokens.size], mask[row, : tokens.size] = tokens, 1
        return {"input_ids": ids, "attention_mask": mask} if self.text.is_masked else {0: ids}

    def run(self, request: Any, prompts: Sequence[str], lora: Array | None) -> list[Embedding]:
        """Return the embedding of each prompt, without the batch axis; `lora`: the weights of adapters."""
        feed = self.feed(prompts)
        request.infer(feed if lora is None else with_weights(feed, lora))
        found = [
            np.array((request.get_tensor(port) if isinstance(port, str) else request.get_output_tensor(port)).data)
            for port in self.text.outputs
        ]
        if self.text.is_masked:
            found.append(feed["attention_mask"])
        return [tuple(array[row].copy() for array in found) for row in range(len(prompts))]


class PromptEncoder:
    """The tokenizers of a model, and a cache of embeddings by prompt."""

    def __init__(self, profile: ModelProfile, family: Family, loras: Loras) -> None:
        self._loras = loras
        self._encoders = [_Encoder(profile.directory, text) for text in family.texts]
        self._main = self._encoders[family.main_text]
        self._cache = ArrayCache(CACHE_BYTES)
        self._lock = threading.Lock()
        self._hits = self._misses = 0  # under the lock: several slots encode at once

    @property
    def lookups(self) -> tuple[int, int]:
        """How many prompts had embeddings in the cache, and how many had not."""
        return self._hits, self._misses

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Count all tokens of a prompt, special tokens included: of the encoder that reads all of it, or of the first.

        Args:
            prompt: the text.
            clip: count with the first encoder, which is CLIP's in families where another one reads the whole prompt.
        """
        return (self._encoders[0] if clip else self._main).count(prompt)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        """Return the longest prefix of a prompt that fits the window."""
        encoder = self._encoders[0] if clip else self._main
        return truncate_to_window(prompt, encoder.count, encoder.text.window)

    def embed(self, index: int, prompts: Sequence[str], requests: Requests, work: Work) -> list[Embedding]:
        """Return each prompt's embedding by one encoder: the outputs that the family names, without the batch axis.

        The weights of the adapters that change the encoder are part of the cache's key.
        """
        weights = self._loras.weights(work, self._encoders[index].text.component)
        return self._embed(index, prompts, requests, weights)

    def _embed(self, index: int, prompts: Sequence[str], requests: Requests, weights: Weights) -> list[Embedding]:
        missing = [p for p in dict.fromkeys(prompts) if self._cache.find((index, weights, p)) is None]
        with self._lock:
            self._misses += len(missing)
            self._hits += len(prompts) - len(missing)
        fresh: dict[str, Embedding] = {}
        encoder = self._encoders[index]
        request = requests.adapted[encoder.text.component] if weights else requests.text_encoders[index]
        # Prompts of encoders with a mask go in alone, as in the library: their attention may depend on the batch.
        groups = [[prompt] for prompt in missing] if encoder.text.is_masked else [missing] * bool(missing)
        try:
            for group in groups:
                rows = self._loras.rows([weights] * len(group)) if weights else None
                for prompt, embedding in zip(group, encoder.run(request, group, rows), strict=True):
                    fresh[prompt] = embedding
                    self._raise_limit(embedding)
                    self._cache.put((index, weights, prompt), embedding)
        finally:
            if isinstance(request, OnDemand):
                request.release()
        return [fresh[p] if p in fresh else self._cached(index, p, requests, weights) for p in prompts]

    def _raise_limit(self, embedding: Embedding) -> None:
        wanted = CACHE_PROMPTS * sum(array.nbytes for array in embedding)
        self._cache.raise_limit(min(wanted, MAX_CACHE_BYTES))

    def _cached(self, index: int, prompt: str, requests: Requests, weights: Weights) -> Embedding:
        cached = self._cache.find((index, weights, prompt))
        # None: evicted a moment ago.
        return cached if cached is not None else self._embed(index, [prompt], requests, weights)[0]
