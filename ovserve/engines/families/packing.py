"""Latents as the tokens of a transformer, in patches of 2x2 cells, and the positions of these tokens."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.schedulers.noise import Array

__all__ = ["PATCH", "grid", "pack", "pack_mask", "unpack"]

PATCH = 2  # cells on a side of a token


def pack(latents: Array) -> Array:
    """Return latents (N, C, h, w) as tokens (N, h/2 * w/2, 4 C); the channels of a token are ordered C, row, column."""
    rows, channels, height, width = latents.shape
    split = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    tokens = split.transpose(0, 2, 4, 1, 3, 5).reshape(rows, (height // PATCH) * (width // PATCH), channels * PATCH**2)
    return np.ascontiguousarray(tokens)


def unpack(tokens: Array, height: int, width: int) -> Array:
    """Return tokens (N, S, 4 C) of a picture of height x width latent cells as latents (N, C, height, width)."""
    rows, _, channels = tokens.shape
    split = tokens.reshape(rows, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    latents = split.transpose(0, 3, 1, 4, 2, 5).reshape(rows, channels // PATCH**2, height, width)
    return np.ascontiguousarray(latents)


def pack_mask(mask: Array, scale: int) -> Array:
    """Return a mask (H, W) in pixels as channels of tokens: (1, S, 4 scale^2), each cell's pixels as channels."""
    height, width = mask.shape[0] // scale, mask.shape[1] // scale
    cells = mask.reshape(height, scale, width, scale).transpose(1, 3, 0, 2).reshape(1, scale * scale, height, width)
    return pack(cells)


@lru_cache(maxsize=64)
def grid(first: int, height: int, width: int, axes: int) -> NDArray[np.float32]:
    """Return the positions of height x width tokens: float32 (S, axes) of `first`, row, column, and zeros."""
    positions = np.zeros((height, width, axes), np.float32)
    positions[..., 0] = first
    positions[..., 1] = np.arange(height)[:, None]
    positions[..., 2] = np.arange(width)[None]
    found = positions.reshape(height * width, axes)
    found.setflags(write=False)
    return found
