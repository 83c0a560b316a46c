"""Step rules: how many denoising steps a strength runs, and which steps and strengths run at least one."""

from __future__ import annotations

import math
import struct

from ovserve.models.profile import ModelProfile

__all__ = ["is_lcm", "least_steps", "least_strength", "steps_run"]


def steps_run(num_inference_steps: int, strength: float) -> int:
    """How many of `num_inference_steps` an edit at `strength` runs: the product in float32, cut, as the library computes it."""

    def single(value: float) -> float:  # float32 without numpy: the front end does not pay for it
        return float(struct.unpack("f", struct.pack("f", value))[0])

    return min(int(single(single(num_inference_steps) * single(strength))), num_inference_steps)


def least_steps(strength: float) -> int:
    """The fewest `num_inference_steps` of which an edit at `strength` (above 0) runs one."""
    # The product is taken in float32, so one fewer may do, or one more be needed.
    count = max(1, math.ceil(1 / strength) - 1)
    while not steps_run(count, strength):
        count += 1
    return count


def least_strength(num_inference_steps: int) -> float:
    """The smallest strength, to two decimals or as many as the count of steps has digits, at which one step runs."""
    scale: int = 10 ** max(2, len(str(num_inference_steps)))
    return math.ceil(scale / num_inference_steps) / scale


def is_lcm(profile: ModelProfile, scheduler: str) -> bool:
    """Whether a request for `scheduler`, empty for the model's own, runs on LCM's schedule (arXiv:2310.04378).

    There the steps are taken from the part of a longer schedule that strength leaves: all of them run, or none.
    """
    return (scheduler or profile.scheduling.name.lower()) == "lcm"
