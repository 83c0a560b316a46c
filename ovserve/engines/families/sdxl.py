"""SDXL: two CLIP text encoders, a pooled embedding, and the picture's size as conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ovserve.engines.families.protocol import Conditions, Encode
from ovserve.engines.families.unet import UnetFamily
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import f32
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["Sdxl"]


class Sdxl(UnetFamily):
    """The protocol `Family`: Podell et al. 2023, arXiv:2307.01952.

    Raises:
        ModelError: a configuration file cannot be read.
    """

    vae_overflows_float16 = True

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        self._forces_zeros = _forces_zeros(profile.directory)

    def embedding_outputs(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the second-to-last hidden state and, for the second encoder, the pooled embedding.

        Outputs: two of the last layer, of which the second encoder's first one is pooled, then hidden states 0..layers.
        """
        return (int(config.get("num_hidden_layers") or 0) + 1, 0)

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return hidden states, pooled embeddings and time ids: arXiv:2307.01952, sections 2.1 and 2.2.

        Which encoder reads which prompt is as in the library.
        """
        rows = self.guidance.rows(work)
        negative = work.negative_prompt_2 or work.negative_prompt
        zeros = rows == 2 and not work.negative_prompt and self._forces_zeros
        encode_negative = rows == 2 and not zeros
        first = [negative] * encode_negative + [work.prompt_2 or work.prompt]
        second = [work.negative_prompt] * encode_negative + [work.prompt]
        small, large = embed(0, first), embed(1, second)
        hidden = [np.concatenate([a[0], b[0]], axis=-1) for a, b in zip(small, large, strict=True)]
        pooled = [found[1] for found in large]
        if zeros:
            hidden, pooled = [np.zeros_like(hidden[0]), *hidden], [np.zeros_like(pooled[0]), *pooled]
        width, height = work.width, work.height
        ids = np.array([[width, height, 0, 0, width, height]] * len(hidden), f32)
        arrays = {"encoder_hidden_states": np.stack(hidden), "text_embeds": np.stack(pooled), "time_ids": ids}
        return Conditions(arrays | self.guidance.inputs(work), rows)


def _forces_zeros(directory: Path) -> bool:
    """Return whether zeros stand for a missing negative prompt, and not the embedding of an empty text.

    Reads model_index.json as the library does.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        document = json.loads((directory / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: model_index.json cannot be read: {error}") from None
    return bool(document.get("force_zeros_for_empty_prompt", True))
