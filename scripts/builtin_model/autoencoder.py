"""The autoencoder: factor 8, 4 channels, convolutions on small grids only, pixel (un)shuffle for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows it by
from torch import Tensor, nn

__all__ = ["LATENT_CHANNELS", "VAE_SCALE_FACTOR", "Autoencoder", "pixels_from", "tensor_from"]

LATENT_CHANNELS = 4
VAE_SCALE_FACTOR = 8


class ResidualBlock(nn.Module):
    """Two convolutions beside an identity; starts as the identity. No normalisation: flat areas keep their exact level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Float (N, channels, H, W) in and out."""
        changed: Tensor = self.second(F.silu(self.first(F.silu(x))))
        return x + changed


class Autoencoder(nn.Module):
    """Deterministic encoder and decoder.

    Args:
        middle: channels at a quarter of the side.
        deep: channels at an eighth of the side.
        fine: channels at half of the side, decoder only: the edges are made there.
        fine_blocks: residual blocks at half of the side.
    """

    def __init__(self, middle: int = 48, deep: int = 64, fine: int = 16, fine_blocks: int = 1) -> None:
        super().__init__()
        self.settings = {"middle": middle, "deep": deep, "fine": fine, "fine_blocks": fine_blocks}
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            ResidualBlock(middle),
            nn.Conv2d(middle, deep, 3, stride=2, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.SiLU(),
            nn.Conv2d(deep, LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, deep, 3, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.SiLU(),
            nn.Conv2d(deep, 4 * middle, 1),
            nn.PixelShuffle(2),
            ResidualBlock(middle),
            ResidualBlock(middle),
            nn.SiLU(),
            nn.Conv2d(middle, 4 * fine, 3, padding=1),
            nn.PixelShuffle(2),
            *(ResidualBlock(fine) for _ in range(fine_blocks)),
            nn.SiLU(),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Float (N, 3, H, W) in -1..1 to latents (N, 4, H/8, W/8)."""
        latents: Tensor = self.encoder(images)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, 4, h, w) to float (N, 3, 8h, 8w), about -1..1, not clamped."""
        images: Tensor = self.decoder(latents)
        return images

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> Autoencoder:
        """Rebuild from `{"settings": ..., "weights": ...}`."""
        model = cls(**checkpoint["settings"])
        model.load_state_dict(checkpoint["weights"])
        return model


def tensor_from(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def pixels_from(images: Tensor) -> npt.NDArray[np.uint8]:
    """Float (N, 3, H, W), about -1..1, to uint8 (N, H, W, 3)."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    array: npt.NDArray[np.uint8] = levels.cpu().numpy()
    return array
