"""Pictures other than scenes (dead leaves, coloured noise), so that the autoencoder can also encode users' uploads."""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from scripts.builtin_model.scenes import PICTURE_PX
from tests.reader import outline

__all__ = ["sample_texture"]

_CORNERED = ("square", "star", "triangle", "cross", "diamond", "heart")


def sample_texture(rng: random.Random) -> npt.NDArray[np.uint8]:
    """Return one picture: uint8 (PICTURE_PX, PICTURE_PX, 3), RGB."""
    return _dead_leaves(rng) if rng.random() < 0.45 else _power_law_noise(np.random.default_rng(rng.getrandbits(64)))


def _dead_leaves(rng: random.Random) -> npt.NDArray[np.uint8]:
    """Return overlapping shapes of all sizes and colours, with edges at every angle."""

    def paint() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", (PICTURE_PX, PICTURE_PX), paint())
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 60)):
        radius = PICTURE_PX * (0.03 + 0.34 * rng.random() ** 2.2)
        x, y = rng.uniform(0, PICTURE_PX), rng.uniform(0, PICTURE_PX)
        if rng.random() < 0.5:
            height = radius * rng.uniform(0.4, 1)
            pen.ellipse([x - radius, y - height, x + radius, y + height], fill=paint())
            continue
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        corners = outline(rng.choice(_CORNERED), radius)
        pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in corners], fill=paint())
    return np.asarray(image)


def _power_law_noise(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return noise with the spectrum of photographs (amplitude about 1/f) and partly correlated channels."""
    rows, columns = np.fft.fftfreq(PICTURE_PX)[:, None], np.fft.rfftfreq(PICTURE_PX)[None, :]
    squared = rows**2 + columns**2
    squared[0, 0] = 1  # the mean is set below
    white = rng.standard_normal((3, PICTURE_PX, PICTURE_PX))
    falloff = rng.uniform(0.6, 1.1)
    noise = np.fft.irfft2(np.fft.rfft2(white, axes=(1, 2)) / squared**falloff, axes=(1, 2))
    noise /= noise.std(axis=(1, 2), keepdims=True) + 1e-6
    noise = np.tensordot(np.eye(3) + rng.uniform(0, 2) * np.ones((3, 3)), noise, 1)
    noise /= noise.std() + 1e-6
    levels = 128 + rng.uniform(20, 60) * noise + rng.uniform(-50, 50, (3, 1, 1))
    return np.clip(levels.transpose(1, 2, 0), 0, 255).astype(np.uint8)
