"""Latent consistency models: guidance as an input of the UNet, and no scheduler but the model's own.

Luo et al. 2023, arXiv:2310.04378. In everything else such a model is a Stable Diffusion model, or an SDXL one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import numpy as np

from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32

__all__ = ["EmbeddedGuidance", "guidance_embedding"]


def _c_function(name: str) -> Callable[[float], float]:
    """Return a function of the C library that takes and returns a float (single precision)."""
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    found: Callable[[float], float] = function
    return found


_EXP, _SIN, _COS = _c_function("expf"), _c_function("sinf"), _c_function("cosf")


class EmbeddedGuidance(RowGuidance):
    """The UNet takes an embedding of the guidance scale: one row for each picture.

    Args:
        length: length of the embedding (arXiv:2310.04378, section 4.2).
    """

    is_distilled = True

    def __init__(self, length: int) -> None:
        self._length = length

    def rows(self, work: Work) -> int:  # noqa: ARG002 - of the protocol
        """Return 1."""
        return 1

    def inputs(self, work: Work) -> dict[str, Array]:
        """Return the embedding of the guidance scale."""
        return {"timestep_cond": guidance_embedding(work.guidance_scale, self._length)}


def guidance_embedding(guidance_scale: float, length: int) -> Array:
    """Return LCM's sinusoidal embedding of the guidance scale: float32 (1, length); arXiv:2310.04378, section 4.2.

    Uses the single-precision functions of the C library, as OpenVINO GenAI does: rounding the results of the double
    ones gives other bits in one value of a hundred.
    """
    scaled = f32(f32(f32(guidance_scale) - f32(1)) * f32(1000))
    half = length // 2
    rate = f32(math.log(10000) / (half - 1))
    angles = [float(f32(f32(_EXP(float(f32(f32(i) * -rate)))) * scaled)) for i in range(half)]
    values = [*map(_SIN, angles), *map(_COS, angles), *[0.0] * (length % 2)]
    return np.array([values], f32)
