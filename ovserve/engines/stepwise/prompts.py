"""From prompts to what the UNet is conditioned on: tokens, text encoders, pooled embeddings and time ids.

Thread-safe; `conditions` runs in a slot, the rest in any thread.
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

__all__ = ["Conditions", "TextSide", "guidance_embedding"]


def _single(name: str) -> Callable[[float], float]:
    """A function of the C library that takes and gives a float."""
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    found: Callable[[float], float] = function
    return found


_EXP, _SIN, _COS = _single("expf"), _single("sinf"), _single("cosf")

TOKEN_CACHE_BYTES = 1024 * 1024  # thousands of prompts of ordinary length
CACHE_BYTES = 64 * 1024 * 1024  # some hundred prompts of SDXL (77 x 2048 floats), thousands of smaller models


@dataclass(frozen=True, slots=True)
class Conditions:
    """UNet inputs of one picture besides latents and timestep, one row or two: without and with the prompt.

    Attributes:
        arrays: by the UNet's input name, float32 (rows, ...).
        rows: 2 with classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), else 1.
    """

    arrays: dict[str, Array]
    rows: int


class _Encoder:
    """One tokenizer and what is known of the text encoder behind it."""

    def __init__(self, directory: Path, index: int, window: int) -> None:
        suffix = "" if index == 0 else f"_{index + 1}"
        config = component_config(directory / f"text_encoder{suffix}")
        self._tokenizer = og.Tokenizer(str(directory / f"tokenizer{suffix}"))
        self.window = int(config.get("max_position_embeddings") or window)
        # SDXL reads the last hidden state but one: outputs are the last, the pooled one, then hidden states 0..layers.
        self.penultimate = int(config.get("num_hidden_layers") or 0) + 1
        self._padding = self._tokenizer.get_pad_token_id()
        self._cache = ArrayCache(TOKEN_CACHE_BYTES)

    def tokens(self, prompt: str) -> NDArray[np.int64]:
        """All tokens of a prompt; counted before the queue for the device, they are there when the prompt is encoded."""
        found = self._cache.find(prompt)
        if found is None:
            found = (np.array(self._tokenizer.encode(prompt).input_ids.data, np.int64).ravel(),)
            self._cache.put(prompt, found)
        return found[0]

    def ids(self, prompt: str) -> NDArray[np.int64]:
        """Tokens cut and padded to the window, as the library does: nothing is forced to the end of a prompt that was cut."""
        padded = np.full(self.window, self._padding, np.int64)
        found = self.tokens(prompt)[: self.window]
        padded[: found.size] = found
        return padded


class TextSide:
    """Tokenizers, and prompt embeddings kept by prompt."""

    def __init__(self, profile: ModelProfile, time_cond_dim: int, force_zeros: bool) -> None:
        self._profile = profile
        self._time_cond_dim = time_cond_dim
        self._force_zeros = force_zeros
        self._encoders = [
            _Encoder(profile.directory, index, profile.prompt_tokens) for index in range(profile.text_encoders)
        ]
        self._cache = ArrayCache(CACHE_BYTES)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, special tokens included, not truncated."""
        return len(self._encoders[0].tokens(prompt))

    def cut_prompt(self, prompt: str) -> str:
        """The longest beginning of a prompt that fits the window."""
        return truncate_to_window(prompt, self.count_tokens, self._encoders[0].window)

    def is_guided(self, work: Work) -> bool:
        """Whether a picture takes two rows. A guidance embedding takes the place of the second (arXiv:2310.04378)."""
        return work.guidance_scale > 1 and not self._time_cond_dim

    def conditions(self, work: Work, requests: Sequence[Any]) -> Conditions:
        """What the UNet is conditioned on, from the cache or the text encoders in `requests`."""
        guided = self.is_guided(work)
        arrays = self._sdxl(work, guided, requests) if len(self._encoders) > 1 else self._plain(work, guided, requests)
        if self._time_cond_dim:
            arrays["timestep_cond"] = guidance_embedding(work.guidance_scale, self._time_cond_dim)
        return Conditions(arrays, 2 if guided else 1)

    def _plain(self, work: Work, guided: bool, requests: Sequence[Any]) -> dict[str, Array]:
        prompts = [work.negative_prompt, work.prompt] if guided else [work.prompt]
        hidden = [found[0] for found in self._encode(0, prompts, requests)]
        return {"encoder_hidden_states": np.stack(hidden)}

    def _sdxl(self, work: Work, guided: bool, requests: Sequence[Any]) -> dict[str, Array]:
        """Podell et al. 2023, arXiv:2307.01952, section 2.1 and 2.2; which prompt goes to which encoder as the library has it."""
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
        """Embeddings of each prompt by one encoder: hidden states (window, d), for SDXL's also the pooled ones (p)."""
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
        return [fresh[p] if p in fresh else self._found(index, p, requests) for p in prompts]

    def _found(self, index: int, prompt: str, requests: Sequence[Any]) -> tuple[Array, ...]:
        kept = self._cache.find((index, prompt))
        return kept if kept is not None else self._encode(index, [prompt], requests)[0]  # pushed out a moment ago


def guidance_embedding(guidance_scale: float, length: int) -> Array:
    """LCM's sinusoidal embedding of the guidance scale: float32 (1, length); arXiv:2310.04378, section 4.2.

    With the C library's own functions of single precision, as the library has it: rounding the double ones differs in a hundredth
    of the values.
    """
    scaled = f32(f32(f32(guidance_scale) - f32(1)) * f32(1000))
    half = length // 2
    rate = f32(math.log(10000) / (half - 1))
    angles = [float(f32(f32(_EXP(float(f32(f32(i) * -rate)))) * scaled)) for i in range(half)]
    values = [*map(_SIN, angles), *map(_COS, angles), *[0.0] * (length % 2)]
    return np.array([values], f32)
