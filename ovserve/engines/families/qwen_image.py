"""Qwen-Image: a Qwen2.5-VL text encoder behind a fixed template, packed latents, guidance that keeps the norm.

Wu et al. 2025, arXiv:2508.02324.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ovserve.engines.families.configs import component_config
from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.packing import PATCH, pack, unpack
from ovserve.engines.families.protocol import Conditions, DenoiserRow, Encode, Feed, Source
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.transformer import PackedTransformer, run_transformer
from ovserve.engines.families.vae import sample
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["QwenImage"]

WINDOW = 512


class NormGuidance(RowGuidance):
    """Guidance that keeps the norm of the prediction with the prompt; only where there is a negative prompt."""

    def rows(self, work: Work) -> int:
        """Return 2 where there is a negative prompt and the guidance scale has an effect, else 1."""
        return super().rows(work) if work.negative_prompt else 1

    def combine(self, predictions: Sequence[Array], work: Work) -> tuple[Array, Array]:
        """Return the guided prediction with the norm of each token of the last prediction."""
        guided, difference = super().combine(predictions, work)
        return _with_norm_of(predictions[-1], guided), difference

    def reuse(self, given: Array, difference: Array, work: Work) -> Array:
        """Return the same with the difference of an earlier step."""
        return _with_norm_of(given, super().reuse(given, difference, work))


def _with_norm_of(given: Array, guided: Array) -> Array:
    tokens, wanted = pack(guided), pack(given)
    norms = np.linalg.norm(wanted, axis=-1, keepdims=True) / np.linalg.norm(tokens, axis=-1, keepdims=True)
    return unpack(tokens * norms.astype(f32), *guided.shape[2:])


class QwenImage(PackedTransformer):
    """The protocol `Family`.

    Raises:
        ModelError: a configuration file cannot be read, or lacks the statistics of the latents.
    """

    inputs = frozenset(
        {
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "height",
            "width",
        }
    )
    required_inputs: tuple[str, ...] = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
    )

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        self.guidance = NormGuidance()
        prefix, _, suffix = profile.traits.prompt_template.partition("{}")
        self._dropped = profile.traits.dropped_tokens
        self.texts = (
            TextEncoder(
                "text_encoder",
                "tokenizer",
                WINDOW,
                ("last_hidden_state",),
                is_masked=True,
                is_padded=False,
                prefix=prefix,
                suffix=suffix,
                skipped=self._dropped,
            ),
        )
        vae = component_config(profile.directory / "vae_decoder")
        try:
            mean, deviation = (
                np.array(vae[name], f32).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
            )
        except KeyError as error:
            raise ModelError(f"vae_decoder/config.json: {error.args[0]} is missing") from None
        self._mean, self._inverse = mean, f32(1) / deviation

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the embeddings of the prompts, padded to the window, and their masks; the negative one first."""
        rows = self.guidance.rows(work)
        prompts = [work.negative_prompt, work.prompt] if rows == 2 else [work.prompt]
        found = [hidden[self._dropped :] for hidden, _ in embed(0, prompts)]
        hidden = np.zeros((rows, WINDOW, found[0].shape[1]), np.float32)
        mask = np.zeros((rows, WINDOW), np.int64)
        for row, tokens in enumerate(found):
            hidden[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return Conditions({"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}, rows)

    def encode(self, image: Pixels, source: Source) -> Array:
        """Return latents drawn from the posterior of an image, normalised by channel."""
        drawn = sample(source.moments(image, None), source.draw, source.vae)
        normalised: Array = (drawn - self._mean) * self._inverse
        return normalised

    def decoder_input(self, latents: Array) -> Array:
        """Return the latents as the VAE has them."""
        found: Array = latents / self._inverse + self._mean
        return found

    def positions(self, rows: Sequence[DenoiserRow]) -> Feed:
        """Return height and width in tokens, one value for all rows."""
        height, width = (side // PATCH for side in rows[0].sample.shape[2:])
        return {"height": np.array(height, np.int64), "width": np.array(width, np.int64)}

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the transformer and return the predictions, unpacked."""
        return unpack(run_transformer(request, feed), int(feed["height"]) * PATCH, int(feed["width"]) * PATCH)

    def probe_conditions(self, tokens: int, random: np.random.Generator) -> Conditions:
        """Return random conditions of one row."""
        hidden = random.standard_normal((1, tokens, int(self.config["joint_attention_dim"])), np.float32)
        mask = np.ones((1, tokens), np.int64)
        return Conditions({"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}, 1)
