"""Z-Image: captions of any length beside the picture in one sequence; the transformer predicts the negated velocity.

OpenVINO GenAI 2026.4 closes the thinking part of the chat template, which diffusers, with which the models were made,
leaves open. This follows diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.families.packing import PATCH, grid
from ovserve.engines.families.protocol import Conditions, DenoiserRow, Encode, Feed, Source
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.transformer import TransformerFamily, run_transformer
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.models.profile import ModelProfile

__all__ = ["ZImage"]

WINDOW = 512
MULTIPLE = 32  # captions and pictures are padded to multiples of so many tokens
MASKED = np.finfo(np.float32).min  # added to the attention of padding
CAPTION_TOKENS = "caption_tokens"  # of each row, padding included: the picture's positions follow the caption's


def _up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


class ZImage(TransformerFamily):
    """The protocol `Family`. A row's inputs depend on its own picture alone: captions are padded for each picture."""

    inputs = frozenset(
        {"hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "txt_ids", "img_ids"}
    )
    required_inputs: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    patch_channels = 1
    chat: Mapping[str, object] = {"enable_thinking": True}

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        self.texts = (
            TextEncoder("text_encoder", "tokenizer", WINDOW, ("last_hidden_state",), is_masked=True, chat=self.chat),
        )

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the caption's embedding without padding tokens; with guidance, the negative one first."""
        rows = self.guidance.rows(work)
        prompts = [work.negative_prompt, work.prompt] if rows == 2 else [work.prompt]
        captions = [hidden[: int(mask.sum())] for hidden, mask in embed(0, prompts)]
        return self._of_captions(captions)

    def _of_captions(self, captions: Sequence[NDArray[Any]]) -> Conditions:
        rows, length = len(captions), max(_up(len(caption)) for caption in captions)
        hidden = np.zeros((rows, length, captions[0].shape[1]), np.float32)
        mask = np.full((rows, length), MASKED, np.float32)
        positions = np.zeros((rows, length, 3), np.int32)
        for row, caption in enumerate(captions):
            own = len(caption)
            hidden[row, :own], mask[row, :own] = caption, 0
            positions[row, : _up(own), 0] = np.arange(1, _up(own) + 1)
        tokens = np.array([_up(len(caption)) for caption in captions], np.int32)
        arrays = {
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
            "txt_ids": positions,
            CAPTION_TOKENS: tokens,
        }
        return Conditions(arrays, rows)

    def draw_start(self, work: Work, source: Source) -> tuple[Array | None, Array]:
        """Return the image's latents and noise; the library draws the noise first."""
        noise = source.draw(self.noise_shape(work, source))
        return None if work.initial_image is None else self.encode(work.initial_image, source), noise

    def timestep_of(self, timestep: np.float32) -> np.float32:
        """Return how much of the noise is gone, 0..1."""
        return f32((f32(1000) - timestep) / f32(1000))

    def positions(self, rows: Sequence[DenoiserRow]) -> Feed:
        """Return the positions of the picture's tokens, padded: (rows, S, 3), the first coordinate after the caption's.

        Those of the captions are conditions.
        """
        height, width = (side // PATCH for side in rows[0].sample.shape[2:])
        found = np.zeros((len(rows), _up(height * width), 3), np.int32)
        for index, row in enumerate(rows):
            found[index, : height * width] = grid(0, height, width, 3)
            found[index, : height * width, 0] = int(row.conditions.arrays[CAPTION_TOKENS][row.index]) + 1
        return {"img_ids": found}

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the transformer and return the velocity."""
        return -run_transformer(request, feed)

    def probe_conditions(self, tokens: int, random: np.random.Generator) -> Conditions:
        """Return random conditions of one row: a caption of a usual length."""
        length = min(tokens, 2 * MULTIPLE)
        return self._of_captions([random.standard_normal((length, int(self.config["cap_feat_dim"])), np.float32)])
