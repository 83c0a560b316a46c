"""Stable Diffusion 3 and 3.5: two CLIP encoders and a T5; latents are not packed, and timesteps run up to 1000.

Esser et al. 2024, arXiv:2403.03206, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.families.configs import component_config, number
from ovserve.engines.families.protocol import Conditions, Encode, Feed, PlanMaker
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.transformer import TransformerFamily, run_transformer
from ovserve.engines.protocol import CLIP_WINDOW, Work
from ovserve.engines.schedulers.flow import FlowScheduler, constant_levels
from ovserve.engines.schedulers.noise import Array
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["StableDiffusion3"]

T5_WINDOW = 256


class StableDiffusion3(TransformerFamily):
    """The protocol `Family`. A directory without the T5 encoder gets zeros for its embedding, as in the paper."""

    inputs = frozenset({"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"})
    required_inputs: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    patch_channels = 1

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        self._has_t5 = (profile.directory / "text_encoder_3").is_dir()
        texts = [_clip(profile.directory, suffix) for suffix in ("", "_2")]
        if self._has_t5:
            texts.append(TextEncoder("text_encoder_3", "tokenizer_3", T5_WINDOW, (0,)))
        self.texts = tuple(texts)
        self.main_text = len(texts) - 1 if self._has_t5 else 0

    def schedulers(self, document: Mapping[str, Any], class_name: str) -> tuple[str, dict[str, PlanMaker]]:  # noqa: ARG002
        """Return the model's scheduler.

        Raises:
            ModelError: its configuration is not supported.
        """
        if document.get("use_dynamic_shifting"):
            raise ModelError("scheduler_config.json: use_dynamic_shifting must be false for this family")
        return "", {"": FlowScheduler(document, levels=constant_levels)}

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the embeddings of the prompts, the negative ones first: arXiv:2403.03206, figure 2."""
        rows = self.guidance.rows(work)
        prompts = [(work.prompt, work.prompt_2, work.prompt_3)]
        if rows == 2:
            prompts.insert(0, (work.negative_prompt, work.negative_prompt_2, work.negative_prompt_3))
        found = [self._embed(first, second or first, third or first, embed) for first, second, third in prompts]
        hidden, pooled = (np.stack(part) for part in zip(*found, strict=True))
        return Conditions({"encoder_hidden_states": hidden, "pooled_projections": pooled}, rows)

    def _embed(self, first: str, second: str, third: str, embed: Encode) -> tuple[Array, Array]:
        """Return hidden states (77 + 256, d) and the pooled embedding of one prompt."""
        ((pooled_1, hidden_1),) = embed(0, [first])
        ((pooled_2, hidden_2),) = embed(1, [second])
        clip = np.concatenate([hidden_1, hidden_2], axis=-1)
        width = int(self.config["joint_attention_dim"])
        t5: NDArray[Any] = embed(2, [third])[0][0] if self._has_t5 else np.zeros((T5_WINDOW, width), np.float32)
        padded = np.zeros((len(clip), width), np.float32)
        padded[:, : clip.shape[1]] = clip
        return np.concatenate([padded, t5]), np.concatenate([pooled_1, pooled_2], axis=-1)

    def timestep_of(self, timestep: np.float32) -> np.float32:
        """Return the training timestep itself."""
        return timestep

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the transformer and return the predictions.

        Raises:
            RuntimeError: the call failed, or its output has another size.
        """
        found = run_transformer(request, feed)
        if found.shape != feed["hidden_states"].shape:
            raise RuntimeError(f"the transformer returned {found.shape} for {feed['hidden_states'].shape}")
        return found

    def probe_conditions(self, tokens: int, random: np.random.Generator) -> Conditions:  # noqa: ARG002
        """Return random conditions of one row."""
        width, pooled = (int(self.config[name]) for name in ("joint_attention_dim", "pooled_projection_dim"))
        arrays = {
            "encoder_hidden_states": random.standard_normal((1, CLIP_WINDOW + T5_WINDOW, width), np.float32),
            "pooled_projections": random.standard_normal((1, pooled), np.float32),
        }
        return Conditions(arrays, 1)


def _clip(directory: Path, suffix: str) -> TextEncoder:
    """Return a CLIP encoder: the pooled embedding, and the second-to-last hidden state.

    Outputs: the pooled embedding, the last hidden state, then hidden states 0..layers.
    """
    config = component_config(directory / f"text_encoder{suffix}")
    layers = int(number(config, "num_hidden_layers", 0))
    window = int(number(config, "max_position_embeddings", CLIP_WINDOW))
    return TextEncoder(f"text_encoder{suffix}", f"tokenizer{suffix}", window, (0, layers + 1))
