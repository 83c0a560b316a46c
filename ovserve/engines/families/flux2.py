"""FLUX.2 klein: one Qwen3 text encoder, latents normalised by channel, several reference images.

The distilled models take no guidance; the base models have classifier-free guidance against an empty prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from ovserve.engines.families.configs import component_config, number
from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.packing import pack, unpack
from ovserve.engines.families.protocol import Conditions, DenoiserRow, Encode, Feed, Source
from ovserve.engines.families.references import ReferenceTransformer
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.vae import read_vae_config
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.flow import shift_empirical
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["Flux2Klein"]

WINDOW = 512
LAYERS = (9, 18, 27)  # of the text encoder, whose hidden states are the embedding
REFERENCE_DISTANCE = 10  # between the first coordinates of the picture and of each reference, as in diffusers


class _KleinGuidance(RowGuidance):
    """Classifier-free guidance, for the models that are not distilled."""

    def __init__(self, *, is_distilled: bool) -> None:
        self.is_distilled = is_distilled

    def rows(self, work: Work) -> int:
        """Return 2 where the guidance scale has an effect, else 1."""
        return 1 if self.is_distilled else super().rows(work)


class Flux2Klein(ReferenceTransformer):
    """The protocol `Family` for FLUX.2 klein, distilled and base.

    Raises:
        ModelError: a configuration file cannot be read, or lacks the statistics of the latents.
    """

    inputs = frozenset({"hidden_states", "timestep", "encoder_hidden_states", "img_ids", "txt_ids", "guidance"})
    required_inputs: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states", "img_ids", "txt_ids")
    position_axes = 4
    shift = staticmethod(shift_empirical)

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        try:
            index = json.loads((profile.directory / "model_index.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{profile.directory}: model_index.json cannot be read: {error}") from None
        self.guidance = _KleinGuidance(is_distilled=bool(index.get("is_distilled", False)))
        text = component_config(profile.directory / "text_encoder")
        layers = tuple(f"hidden_states.{layer}" for layer in text.get("hidden_states_layers") or LAYERS)
        chat = {"enable_thinking": False}
        self.texts = (TextEncoder("text_encoder", "tokenizer", WINDOW, layers, is_masked=True, chat=chat),)
        vae = component_config(profile.directory / "vae_decoder")
        self._vae = read_vae_config(profile.component("vae_decoder"), samples=True)
        try:
            self._mean = np.array(vae["bn_running_mean_data"], f32)
            variance = np.array(vae["bn_running_var_data"], f32)
        except KeyError as error:
            raise ModelError(f"vae_decoder/config.json: {error.args[0]} is missing") from None
        self._deviation = np.sqrt(variance + f32(number(vae, "batch_norm_eps", 1e-4))).astype(f32)

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the hidden states of three layers, side by side; with guidance those of an empty prompt first."""
        rows = self.guidance.rows(work)
        prompts = ["", work.prompt] if rows == 2 else [work.prompt]
        hidden = [np.concatenate(found[:-1], axis=-1) for found in embed(0, prompts)]
        arrays = {"encoder_hidden_states": np.stack(hidden)}
        if self.config.get("guidance_embeds"):
            arrays["guidance"] = np.full(rows, work.guidance_scale, f32)
        return Conditions(arrays, rows)

    def encode(self, image: Pixels, source: Source) -> Array:
        """Return the mean latents of an image, normalised by channel."""
        mean = source.moments(image, None)[0]
        return unpack((pack(mean) - self._mean) / self._deviation, *mean.shape[2:])

    def decoder_input(self, latents: Array) -> Array:
        """Return the latents as the VAE has them."""
        found = unpack(pack(latents) * self._deviation + self._mean, *latents.shape[2:])
        scaled: Array = (found - self._vae.shift_factor) * self._vae.scaling_factor
        return scaled

    def reference_position(self, index: int) -> int:
        """Return 10, 20, ..."""
        return REFERENCE_DISTANCE * (1 + index)

    def positions(self, rows: Sequence[DenoiserRow]) -> Feed:
        """Return the positions of image and text tokens, (rows, S, 4) each."""
        tokens = rows[0].conditions.arrays["encoder_hidden_states"].shape[1]
        text = np.zeros((len(rows), tokens, self.position_axes), np.float32)
        text[..., 3] = np.arange(tokens)
        return {"img_ids": np.stack([self.image_positions(row) for row in rows]), "txt_ids": text}

    def probe_conditions(self, tokens: int, random: np.random.Generator) -> Conditions:
        """Return random conditions of one row."""
        width = int(self.config["joint_attention_dim"])
        arrays = {"encoder_hidden_states": random.standard_normal((1, tokens, width), np.float32)}
        if self.config.get("guidance_embeds"):
            arrays["guidance"] = np.ones(1, np.float32)
        return Conditions(arrays, 1)
