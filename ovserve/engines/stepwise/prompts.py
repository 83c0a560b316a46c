"""Conditions of the UNet from prompts: tokens, text embeddings, pooled embeddings and time ids.

Thread-safe. Runs in: slot threads (`conditions`); any thread (the rest).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as og
from numpy.typing import NDArray

from ovserve.engines.protocol import Work, truncate_to_window
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.stepwise.cache import ArrayCache
from ovserve.engines.stepwise.compiled import component_config
from ovserve.models.profile import ModelProfile

__all__ = ["Conditions", "PromptEncoder", "guidance_embedding"]


def _c_function(name: str) -> Callable[[float], float]:
    """Return a function of the C library that takes and returns a float (single precision)."""
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    found: Callable[[float], float] = function
    return found


_EXP, _SIN, _COS = _c_function("expf"), _c_function("sinf"), _c_function("cosf")

TOKEN_CACHE_BYTES = 1024 * 1024  # thousands of prompts of ordinary length
CACHE_BYTES = 64 * 1024 * 1024  # about a hundred prompts of SDXL (77 x 2048 floats), thousands of smaller models


@dataclass(frozen=True, slots=True)
class Conditions:
    """UNet inputs of one picture besides latents and timestep: two rows (without and with the prompt), or one.

    Attributes:
        arrays: by the UNet's input name, float32 (rows, ...).
        rows: 2 with classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), else 1.
    """

    arrays: dict[str, Array]
    rows: int


class _Encoder:
    """One tokenizer, and the configuration of its text encoder."""

    def __init__(self, directory: Path, index: int, window: int) -> None:
        suffix = "" if index == 0 else f"_{index + 1}"
        config = component_config(directory / f"text_encoder{suffix}")
        self._tokenizer = og.Tokenizer(str(directory / f"tokenizer{suffix}"))
        self.window = int(config.get("max_position_embeddings") or window)
        # SDXL uses the second-to-last hidden state. Outputs: the last, the pooled one, then hidden states 0..layers.
        self.penultimate = int(config.get("num_hidden_layers") or 0) + 1
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

    def __init__(self, profile: ModelProfile, time_cond_dim: int, force_zeros: bool) -> None:
        self._profile = profile
        self._time_cond_dim = time_cond_dim
        self._force_zeros = force_zeros
        self._encoders = [
            _Encoder(profile.directory, index, profile.prompt_tokens) for index in range(profile.text_encoders)
        ]
        self._cache = ArrayCache(CACHE_BYTES)

    def count_tokens(self, prompt: str) -> int:
        """Count all tokens of a prompt, special tokens included."""
        return len(self._encoders[0].tokens(prompt))

    def cut_prompt(self, prompt: str) -> str:
        """Return the longest prefix of a prompt that fits the window."""
        return truncate_to_window(prompt, self.count_tokens, self._encoders[0].window)

    def is_guided(self, work: Work) -> bool:
        """Return whether a picture takes two rows; LCM uses a guidance embedding instead (arXiv:2310.04378)."""
        return work.guidance_scale > 1 and not self._time_cond_dim

    def conditions(self, work: Work, requests: Sequence[Any]) -> Conditions:
        """Return the conditions of a picture, from the cache or the text encoders in `requests`."""
        guided = self.is_guided(work)
        arrays = (
            self._sdxl(work, guided, requests) if len(self._encoders) > 1 else self._one_encoder(work, guided, requests)
        )
        if self._time_cond_dim:
            arrays["timestep_cond"] = guidance_embedding(work.guidance_scale, self._time_cond_dim)
        return Conditions(arrays, 2 if guided else 1)

    def _one_encoder(self, work: Work, guided: bool, requests: Sequence[Any]) -> dict[str, Array]:
        prompts = [work.negative_prompt, work.prompt] if guided else [work.prompt]
        hidden = [found[0] for found in self._encode(0, prompts, requests)]
        return {"encoder_hidden_states": np.stack(hidden)}

    def _sdxl(self, work: Work, guided: bool, requests: Sequence[Any]) -> dict[str, Array]:
        """Return SDXL's conditions: Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2.

        Which encoder reads which prompt is as in the library.
        """
        negative = work.negative_prompt_2 or work.negative_prompt
        zeros = guided and not work.negative_prompt and self._force_zeros
        encode_negative = guided and not zeros
        first = [negative] * encode_negative + [work.prompt_2 or work.prompt]
        second = [work.negative_prompt] * encode_negative + [work.prompt]
        small = self._encode(0, first, requests)
        large = self._encode(1, second, requests)
        hidden = [np.concatenate([a[0], b[0]], axis=-1) for a, b in zip(small, large, strict=True)]
        pooled = [found[1] for found in large]
        if zeros:
            hidden, pooled = [np.zeros_like(hidden[0]), *hidden], [np.zeros_like(pooled[0]), *pooled]
        width, height = work.width, work.height
        ids = np.array([[width, height, 0, 0, width, height]] * len(hidden), f32)
        return {"encoder_hidden_states": np.stack(hidden), "text_embeds": np.stack(pooled), "time_ids": ids}

    def _encode(self, index: int, prompts: list[str], requests: Sequence[Any]) -> list[tuple[Array, ...]]:
        """Return each prompt's embeddings by one encoder: hidden states (window, d); for SDXL also pooled ones (p)."""
        missing = [p for p in dict.fromkeys(prompts) if self._cache.find((index, p)) is None]
        fresh: dict[str, tuple[Array, ...]] = {}
        if missing:
            request, encoder = requests[index], self._encoders[index]
            request.infer({0: np.stack([encoder.ids(prompt) for prompt in missing])})
            outputs = (encoder.penultimate, 0) if len(self._encoders) > 1 else (0,)
            found = [np.array(request.get_output_tensor(place).data) for place in outputs]
            for row, prompt in enumerate(missing):
                fresh[prompt] = tuple(array[row].copy() for array in found)
                self._cache.put((index, prompt), fresh[prompt])
        return [fresh[p] if p in fresh else self._cached(index, p, requests) for p in prompts]

    def _cached(self, index: int, prompt: str, requests: Sequence[Any]) -> tuple[Array, ...]:
        cached = self._cache.find((index, prompt))
        # None: evicted a moment ago.
        return cached if cached is not None else self._encode(index, [prompt], requests)[0]


def guidance_embedding(guidance_scale: float, length: int) -> Array:
    """Return LCM's sinusoidal embedding of the guidance scale: float32 (1, length); arXiv:2310.04378, section 4.2.

    Uses the single-precision functions of the C library, as OpenVINO GenAI does: rounding the results of the double
    ones gives other bits in one value of a hundred.
    """
    scaled = f32(f32(f32(guidance_scale) - f32(1)) * f32(1000))
    half = length // 2
    rate = f32(math.log(10000) / (half - 1))
    angles = [float(f32(f32(_EXP(float(f32(f32(i) * -rate)))) * scaled)) for i in range(half)]
    values = [*map(_SIN, angles), *map(_COS, angles), *[0.0] * (length % 2)]
    return np.array([values], f32)
