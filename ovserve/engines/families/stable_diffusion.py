"""Stable Diffusion 1 and 2: one CLIP text encoder; also latent consistency models made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ovserve.engines.families.protocol import Conditions, Encode
from ovserve.engines.families.unet import UnetFamily
from ovserve.engines.protocol import Work

__all__ = ["StableDiffusion"]


class StableDiffusion(UnetFamily):
    """The protocol `Family`: Rombach et al. 2022, arXiv:2112.10752."""

    def embedding_outputs(self, config: Mapping[str, Any]) -> tuple[int, ...]:  # noqa: ARG002 - of the protocol
        """Return the last hidden state."""
        return (0,)

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the hidden states of the prompts, (77, d) for each row."""
        rows = self.guidance.rows(work)
        prompts = [work.negative_prompt, work.prompt] if rows == 2 else [work.prompt]
        hidden = [found[0] for found in embed(0, prompts)]
        return Conditions({"encoder_hidden_states": np.stack(hidden)} | self.guidance.inputs(work), rows)
