"""What a family needs of the VAE: its configuration, and latents drawn from its posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovserve.engines.families.configs import component_config, number
from ovserve.engines.schedulers.noise import Array, f32

__all__ = ["Draw", "Moments", "VaeConfig", "read_vae_config", "sample"]

Draw = Callable[[tuple[int, ...]], Array]  # returns standard normal noise of a shape: the next of one seed's stream
Moments = tuple[Array, ...]  # mean and standard deviation of an image's latents, or the latents alone


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """vae_decoder/config.json as the library reads it.

    Attributes:
        scale: side of a latent cell in pixels.
        samples: the encoder returns mean and log-variance, not latents.
    """

    latent_channels: int = 4
    scaling_factor: np.float32 = f32(1)
    shift_factor: np.float32 = f32(0)
    scale: int = 8
    samples: bool = True


def read_vae_config(directory: Path, *, samples: bool) -> VaeConfig:
    """Read config.json in the directory of a VAE decoder.

    Raises:
        ModelError: it cannot be read.
    """
    config = component_config(directory)
    levels = config.get("block_out_channels") or config.get("dim_mult") or [64]
    return VaeConfig(
        latent_channels=int(number(config, "latent_channels", number(config, "z_dim", 4))),
        scaling_factor=f32(number(config, "scaling_factor", 1.0)),
        shift_factor=f32(number(config, "shift_factor", 0.0)),
        scale=2 ** (len(levels) - 1),
        samples=samples,
    )


def sample(moments: Moments, draw: Draw, vae: VaeConfig) -> Array:
    """Draw from the VAE's posterior, scaled for the denoiser: Kingma and Welling 2014, arXiv:1312.6114, section 2.4."""
    drawn = moments[0]
    if len(moments) == 2:
        drawn = drawn + moments[1] * draw(drawn.shape)
    scaled: Array = (drawn - vae.shift_factor) * vae.scaling_factor
    return scaled
