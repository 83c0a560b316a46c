"""Step rules: how many denoising steps an edit runs, and the minima of steps and strength for one step."""

from __future__ import annotations

import math
import struct

from ovserve.models.families import LCM_SCHEDULER
from ovserve.models.profile import ModelProfile

__all__ = ["is_lcm", "min_steps_for", "min_strength_for", "steps_run"]


def steps_run(num_inference_steps: int, strength: float) -> int:
    """Return how many of `num_inference_steps` an edit at `strength` runs.

    This is the truncated float32 product, as OpenVINO GenAI computes it.
    """

    def single(value: float) -> float:  # float32 without numpy, so that the front end need not import numpy
        return float(struct.unpack("f", struct.pack("f", value))[0])

    return min(int(single(single(num_inference_steps) * single(strength))), num_inference_steps)


def min_steps_for(strength: float) -> int:
    """Return the smallest `num_inference_steps` with which an edit at `strength` (above 0) runs one step."""
    # The product is rounded to float32, so the exact quotient may be one too high or one too low.
    count = max(1, math.ceil(1 / strength) - 1)
    while not steps_run(count, strength):
        count += 1
    return count


def min_strength_for(num_inference_steps: int) -> float:
    """Return the smallest strength that runs one step.

    It is rounded up to two decimals, or to as many as the step count has digits.
    """
    scale: int = 10 ** max(2, len(str(num_inference_steps)))
    return math.ceil(scale / num_inference_steps) / scale


def is_lcm(profile: ModelProfile, scheduler: str) -> bool:
    """Return whether a request with `scheduler` (empty: the model's own) uses the LCM schedule (arXiv:2310.04378).

    LCM takes its steps from the part of a longer schedule that strength leaves: all of them run, or none.
    """
    return (scheduler or profile.scheduling.name.lower()) == LCM_SCHEDULER
