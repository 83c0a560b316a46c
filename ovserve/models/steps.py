"""Step rules: how many denoising steps run, and the minima of steps and strength.

The front end and the worker use the same rules: the front end rejects a request before it is queued, the worker applies
what depends on pixels. `strength` is 1.0 for text-to-image. `scheduler` is empty for the model's own.
"""

from __future__ import annotations

import math
import struct

from ovserve.models.families import LCM_SCHEDULER
from ovserve.models.profile import ModelProfile

__all__ = [
    "default_strength",
    "denoising_steps",
    "is_lcm",
    "min_steps_for",
    "min_strength_for",
    "raise_steps",
    "smallest_strength",
    "steps_run",
]


def steps_run(num_inference_steps: int, strength: float) -> int:
    """Return how many of `num_inference_steps` an edit at `strength` runs.

    This is the truncated float32 product, as OpenVINO GenAI computes it.
    """
    return min(int(_single(_single(num_inference_steps) * _single(strength))), num_inference_steps)


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


def denoising_steps(profile: ModelProfile, scheduler: str, num_inference_steps: int, strength: float) -> int:
    """Return how many denoising steps run; 0 if the strength leaves too few, which no engine can run."""
    if is_lcm(profile, scheduler):
        is_enough = steps_run(profile.scheduling.original_inference_steps, strength) >= num_inference_steps
        return num_inference_steps if is_enough else 0
    steps = steps_run(num_inference_steps, strength)
    if steps < 1:
        return 0
    if profile.traits.rounds_steps_up:
        left_out = _single(num_inference_steps - _single(_single(num_inference_steps) * _single(strength)))
        return num_inference_steps - int(left_out)
    is_pndm = (scheduler or profile.scheduling.name.lower()) == "pndm"
    # PNDM takes its second step twice (arXiv:2202.09778, as diffusers has it).
    return steps + 1 if is_pndm and num_inference_steps > 1 else steps


def raise_steps(profile: ModelProfile, scheduler: str, num_inference_steps: int, strength: float, limit: int) -> int:
    """Return a default step count, raised until an edit at `strength` runs one step.

    It is returned as it is for LCM, which runs all steps or none, and if even `limit` steps would run none.
    """
    if is_lcm(profile, scheduler) or not steps_run(limit, strength):
        return num_inference_steps
    return max(num_inference_steps, min_steps_for(strength))


def smallest_strength(profile: ModelProfile, scheduler: str, num_inference_steps: int) -> float:
    """Return the smallest strength with which `denoising_steps` is not 0, rounded up."""
    if is_lcm(profile, scheduler):
        return math.ceil(100 * num_inference_steps / profile.scheduling.original_inference_steps) / 100
    return min_strength_for(num_inference_steps)


def default_strength(profile: ModelProfile, *, is_masked: bool, is_variation: bool, preferred: float | None) -> float:
    """Return the strength of an edit that names none; 1 for a model that has none, as all of its steps run.

    Args:
        profile: the model.
        is_masked: whether only a part of the image is edited.
        is_variation: whether the request is a variation.
        preferred: the strength of the request's `input_fidelity` for an edit of the whole image, or None.
    """
    if not profile.takes_strength:
        return 1.0
    if is_masked:
        return profile.defaults.strength_inpainting
    if preferred is not None:
        return preferred
    return profile.defaults.strength_variation if is_variation else profile.defaults.strength


def _single(value: float) -> float:
    """Round to float32, without numpy, so that the front end need not import numpy."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
