"""The denoiser: a text encoder and a UNet that predicts v, with the noise schedule and a sampler for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

__all__ = ["TRAIN_TIMESTEPS", "Denoiser", "alphas_cumprod", "sample_latents", "schedule", "text_config"]

TRAIN_TIMESTEPS = 1000
# "scaled_linear" betas (linear in their square roots). Almost no signal is left at the end (terminal signal-to-noise
# about 6e-5), so that flat backgrounds get the requested colour without rescaling, which not every scheduler of the
# library supports. Half way there is about as much signal as in Stable Diffusion, so that an edit at strength 0.7 keeps
# positions of figures in plain colours.
_BETA_START, _BETA_END = 1e-4, 0.027
TEXT_WIDTH = 128


def text_config(vocabulary_size: int, window: int) -> dict[str, Any]:
    """Return the text encoder's configuration; the special tokens are the last two of the vocabulary."""
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": window,
        "hidden_act": "quick_gelu",
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": vocabulary_size - 2,
        "eos_token_id": vocabulary_size - 1,
        "pad_token_id": vocabulary_size - 1,
    }


def schedule(time_scale: float) -> dict[str, Any]:
    """Return the noise schedule as a scheduler's configuration.

    Args:
        time_scale: only this part of the schedule is used, 0..1, stretched over all timesteps. Below 1 more signal is
            left at each timestep: an edit keeps positions that the whole schedule loses, and a picture from noise
            begins where the model expects some signal. The betas stay linear in their square roots: the sum of those
            up to a timestep, which is minus the logarithm of the signal's variance (to first order), is the sum of the
            whole schedule's up to `time_scale` times the timestep.
    """
    first, last = math.sqrt(_BETA_START), math.sqrt(_BETA_END)
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": time_scale * _BETA_START,
        "beta_end": time_scale * (first + time_scale * (last - first)) ** 2,
    }


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together.

    Args:
        vocabulary_size: vocabulary size of the tokenizer.
        channels: channels of the UNet's levels; each level halves the side.
        patch: side of the latent patches that form one position of the UNet (1: each latent). 2 is a third of the work.
        latent_channels: channels of the latents.
        window: tokens of a prompt.
        time_scale: of its noise schedule. The UNet gets timesteps of the whole schedule, so that weights stay valid
            when this changes.
    """

    def __init__(
        self,
        vocabulary_size: int,
        channels: Sequence[int] = (80, 128),
        patch: int = 2,
        latent_channels: int = 4,
        window: int = 32,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.settings = {
            "vocabulary_size": vocabulary_size,
            "channels": list(channels),
            "patch": patch,
            "latent_channels": latent_channels,
            "window": window,
            "time_scale": time_scale,
        }
        self.time_scale = time_scale
        self.latent_channels, self.window = latent_channels, window
        self.vocabulary_size, self.patch = vocabulary_size, patch
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(vocabulary_size, window)))
        self.unet: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
            sample_size=16 // patch,
            in_channels=latent_channels * patch**2,
            out_channels=latent_channels * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * len(channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(channels),
            attention_head_dim=4,
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=16,
            resnet_time_scale_shift="scale_shift",
            # The pooled caption is added to the timestep embedding inside the UNet, so the export needs no other input.
            addition_embed_type="text",
            addition_embed_type_num_heads=8,
        )

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Predict v for float (N, C, H, W) latents at int64 (N,) timesteps under int64 (N, window) prompts."""
        return self.predict(latents, timesteps, self.text_encoder(input_ids)[0])

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predict v as `forward` does, for encoded prompts: float (N, window, TEXT_WIDTH)."""
        patches = F.pixel_unshuffle(latents, self.patch).contiguous(memory_format=torch.channels_last)
        times = timesteps if self.time_scale == 1 else timesteps * self.time_scale
        predicted = self.unet(patches, times, text, return_dict=False)[0]
        return F.pixel_shuffle(predicted, self.patch)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> Denoiser:
        """Rebuild from `{"settings": ..., "weights": ...}`."""
        model = cls(**checkpoint["settings"])
        model.load_state_dict(checkpoint["weights"])
        return model


def alphas_cumprod(time_scale: float) -> Tensor:
    """Return the part of the picture's variance that is left at each timestep: float32 (TRAIN_TIMESTEPS,)."""
    betas_of = schedule(time_scale)
    start, end = betas_of["beta_start"] ** 0.5, betas_of["beta_end"] ** 0.5
    betas = torch.linspace(start, end, TRAIN_TIMESTEPS, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, 0).float()


@torch.no_grad()
def sample_latents(
    model: Denoiser,
    input_ids: Tensor,
    empty_ids: Tensor,
    noise: Tensor,
    steps: int = 12,
    guidance_scale: float = 3.0,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Sample with deterministic DDIM (Song et al. 2020, equation 12 with sigma 0), guidance and leading spacing.

    Args:
        model: the denoiser.
        input_ids: int64 (N, window), the prompts.
        empty_ids: int64 (window,), the prompt "".
        noise: float (N, C, H, W).
        steps: number of steps at strength 1.
        guidance_scale: classifier-free guidance.
        start: latents to edit, of the same shape as `noise`; the last `steps` x `strength` steps are run on them.
        strength: 0..1; used only with `start`.
    """
    signal = alphas_cumprod(model.time_scale).to(noise.device)
    text = model.text_encoder(torch.cat([empty_ids.expand_as(input_ids), input_ids]))[0]
    timesteps = [i * (TRAIN_TIMESTEPS // steps) + 1 for i in reversed(range(steps))]
    latents = noise
    if start is not None:
        timesteps = timesteps[steps - max(1, int(steps * strength)) :]
        first = signal[timesteps[0]]
        latents = first.sqrt() * start + (1 - first).sqrt() * noise
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        now, then = signal[timestep], signal.new_tensor(1.0) if following is None else signal[following]
        rows = torch.full((2 * len(noise),), timestep, device=noise.device)
        without, with_prompt = model.predict(torch.cat([latents, latents]), rows, text).float().chunk(2)
        v = without + guidance_scale * (with_prompt - without)
        clean = now.sqrt() * latents - (1 - now).sqrt() * v
        left = now.sqrt() * v + (1 - now).sqrt() * latents
        latents = then.sqrt() * clean + (1 - then).sqrt() * left
    return latents
