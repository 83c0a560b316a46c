"""The autoencoder: scale factor 16, convolutions on small grids only.

Pixel shuffle and unshuffle change between the pixels and the small grids. The encoder averages each 2x2 pixels first:
its pictures have no detail finer than an edge, and the shades along an edge give its position. Most of the decoder
works on the smallest grid, where a convolution covers a whole object and can make its outline regular.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  the usual name
from torch import Tensor, nn

__all__ = ["VAE_SCALE_FACTOR", "Autoencoder", "pixels_from", "tensor_from"]

VAE_SCALE_FACTOR = 16


class ResidualBlock(nn.Module):
    """Two convolutions added to their input; initially the identity.

    There is no normalisation, so that flat areas keep their level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to float (N, channels, H, W)."""
        changed: Tensor = self.second(F.silu(self.first(F.silu(x))))
        return x + changed


class Autoencoder(nn.Module):
    """Deterministic encoder and decoder.

    Args:
        middle: channels of the encoder at an eighth of the side.
        deep: channels of the encoder at a sixteenth of the side.
        widths: channels of the decoder at a sixteenth, an eighth, a quarter and half of the side.
        blocks: residual blocks of the decoder at each of these sizes.
        latent_channels: channels of the latents.
    """

    def __init__(
        self,
        middle: int = 48,
        deep: int = 64,
        widths: Sequence[int] = (80, 48, 32, 16),
        blocks: Sequence[int] = (4, 2, 2, 1),
        latent_channels: int = 4,
    ) -> None:
        super().__init__()
        self.settings = {
            "middle": middle,
            "deep": deep,
            "widths": list(widths),
            "blocks": list(blocks),
            "latent_channels": latent_channels,
        }
        self.latent_channels = latent_channels
        self.encoder = nn.Sequential(
            nn.AvgPool2d(2),
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            ResidualBlock(middle),
            nn.Conv2d(middle, deep, 3, stride=2, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.SiLU(),
            nn.Conv2d(deep, latent_channels, 3, padding=1),
        )
        layers: list[nn.Module] = []
        channels = latent_channels
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            # The first upscaling is pointwise: it has the most channels, and the blocks around it cover the neighbours.
            side = 1 if level == 1 else 3
            up = 2 if level else 1
            layers += [nn.Conv2d(channels, width * up**2, side, padding=side // 2), nn.PixelShuffle(up)]
            layers += [*(ResidualBlock(width) for _ in range(count)), nn.SiLU()]
            channels = width
        self.decoder = nn.Sequential(*layers, nn.Conv2d(channels, 12, 3, padding=1), nn.PixelShuffle(2))

    def encode(self, images: Tensor) -> Tensor:
        """Encode float (N, 3, H, W) in -1..1 to latents (N, C, H/16, W/16)."""
        latents: Tensor = self.encoder(images)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to float (N, 3, 16h, 16w), about -1..1, not clamped."""
        images: Tensor = self.decoder(latents)
        return images

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> Autoencoder:
        """Rebuild from `{"settings": ..., "weights": ...}`."""
        model = cls(**checkpoint["settings"])
        model.load_state_dict(checkpoint["weights"])
        return model


def tensor_from(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Convert uint8 (N, H, W, 3) to float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def pixels_from(images: Tensor) -> npt.NDArray[np.uint8]:
    """Convert float (N, 3, H, W), about -1..1, to uint8 (N, H, W, 3)."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    array: npt.NDArray[np.uint8] = levels.cpu().numpy()
    return array
