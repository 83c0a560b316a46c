"""FLUX.1: a CLIP and a T5 text encoder, packed latents, guidance as an input; also FLUX.1 Fill and FLUX.1 Kontext.

Black Forest Labs 2025, arXiv:2506.15742, section 2, which describes the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.packing import PATCH, pack, pack_mask
from ovserve.engines.families.protocol import Conditions, Context, DenoiserRow, Encode, Feed, Source, Start
from ovserve.engines.families.references import ReferenceTransformer
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.transformer import PackedTransformer
from ovserve.engines.families.vae import sample
from ovserve.engines.protocol import CLIP_WINDOW, Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import Plan
from ovserve.models.profile import ModelProfile

__all__ = ["Flux", "FluxFill", "FluxKontext"]

T5_WINDOW = 512


class InputGuidance(RowGuidance):
    """The transformer takes the guidance scale as an input, or has none: one row for each picture."""

    is_distilled = True

    def __init__(self, *, has_input: bool) -> None:
        self._has_input = has_input

    def rows(self, work: Work) -> int:  # noqa: ARG002 - of the protocol
        """Return 1."""
        return 1

    def inputs(self, work: Work) -> dict[str, Array]:
        """Return the guidance scale, if the transformer takes it."""
        return {"guidance": np.array([work.guidance_scale], f32)} if self._has_input else {}


class Flux(PackedTransformer):
    """The protocol `Family` for FLUX.1 schnell and dev."""

    inputs = frozenset(
        {
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "pooled_projections",
            "img_ids",
            "txt_ids",
            "guidance",
        }
    )
    required_inputs: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    texts: tuple[TextEncoder, ...] = (
        TextEncoder("text_encoder", "tokenizer", CLIP_WINDOW, (1,)),
        TextEncoder("text_encoder_2", "tokenizer_2", T5_WINDOW, (0,)),
    )
    main_text = 1

    def __init__(self, profile: ModelProfile) -> None:
        super().__init__(profile)
        self.guidance = InputGuidance(has_input=bool(self.config.get("guidance_embeds", False)))

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return CLIP's pooled embedding of the prompt, T5's hidden states of prompt_2 or the prompt, and guidance."""
        ((pooled,),) = embed(0, [work.prompt])
        ((hidden,),) = embed(1, [work.prompt_2 or work.prompt])
        arrays = {"encoder_hidden_states": hidden[None], "pooled_projections": pooled[None]}
        return Conditions(arrays | self.guidance.inputs(work), 1)

    def positions(self, rows: Sequence[DenoiserRow]) -> Feed:
        """Return the positions, which have no batch axis: all rows have the same layout."""
        tokens = rows[0].conditions.arrays["encoder_hidden_states"].shape[1]
        text = np.zeros((tokens, self.position_axes), np.float32)
        return {"img_ids": self.image_positions(rows[0]), "txt_ids": text}

    def probe_conditions(self, tokens: int, random: np.random.Generator) -> Conditions:
        """Return random conditions of one row."""
        hidden = random.standard_normal((1, tokens, int(self.config["joint_attention_dim"])), np.float32)
        pooled = random.standard_normal((1, int(self.config["pooled_projection_dim"])), np.float32)
        arrays = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
        if self.config.get("guidance_embeds", False):
            arrays["guidance"] = np.array([3.5], np.float32)
        return Conditions(arrays, 1)


class FluxFill(Flux):
    """FLUX.1 Fill: mask and masked image are further channels of each token, so nothing is blended."""

    def expected_channels(self, latent_channels: int) -> int:
        """Return the channels of latents, masked image, and the 8x8 mask pixels of each cell."""
        return 2 * super().expected_channels(latent_channels) + self._mask_channels

    @property
    def _mask_channels(self) -> int:
        cell = self.profile.side_multiple_px // PATCH
        return cell * cell * self.patch_channels

    def latent_channels(self) -> int:
        """Return the channels of the latents."""
        return (self.channels - self._mask_channels) // (2 * self.patch_channels)

    def start(self, work: Work, plan: Plan, source: Source) -> Start:
        """Start from noise; draws in the library's order: noise, masked image."""
        conditions = self.conditions(work, source.embed)
        vae = source.vae
        noise = source.draw(self.noise_shape(work, source))
        latents = noise
        if work.initial_image is None or work.mask_image is None:
            raise ValueError("this model paints in a mask only")
        if f32(work.strength) < 1:
            # As diffusers does; the library would start from pure noise at a level below 1.
            latents = plan.add_noise(self.encode(work.initial_image, source), noise, 0)
        masked = sample(source.moments(work.initial_image, work.mask_image), source.draw, vae)
        mask = (work.mask_image >= 128).astype(np.float32)
        channels = np.concatenate([pack(masked), pack_mask(mask, vae.scale)], axis=2)
        return Start(conditions, latents, source.draw, context=Context(channels, layout=self.layout_of(conditions)))

    def probe_context(self, cells: tuple[int, int]) -> Context:
        """Return mask and masked image of zeros."""
        tokens = (cells[0] // PATCH) * (cells[1] // PATCH)
        extra = self.channels - self.latent_channels() * self.patch_channels
        return Context(np.zeros((1, tokens, extra), np.float32))


class FluxKontext(ReferenceTransformer, Flux):
    """FLUX.1 Kontext: edits by reference; reference i has the first coordinate i: arXiv:2506.15742, section 3."""

    def reference_position(self, index: int) -> int:
        """Return 1, 2, ..."""
        return 1 + index
