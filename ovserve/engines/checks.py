"""Checks of a request against what an engine can run; each engine's `check` is made of them.

The checks of OpenVINO GenAI's limits are for engine `genai`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from ovserve.engines.protocol import Work
from ovserve.errors import InvalidValue
from ovserve.models.profile import ModelProfile
from ovserve.models.steps import is_lcm
from ovserve.wire.request import ImageRequest

__all__ = [
    "WORKER_FIELDS",
    "check_adapters",
    "check_fixed_values",
    "check_known_fields",
    "check_scheduler",
    "check_step_count",
    "check_step_spacing",
    "runs_extra_step",
]

Request = Work | ImageRequest

# Fields that the worker reads before and after the engine, whichever that is.
WORKER_FIELDS = frozenset((
    "task", "images", "mask", "mask_mode", "mask_invert", "mask_blur", "mask_fill", "mask_area", "mask_padding",
    "width", "height", "resize_mode", "n", "seed", "truncate_prompt", "output_format", "output_compression",
    "background", "metadata", "progress", "preferred_strength", "preferred_scheduler", "quality", "input_pixels",
    "input_fidelity",
))  # fmt: skip
_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(ImageRequest)}


def check_known_fields(request: Request, known: frozenset[str], engine: str) -> None:
    """Check that a request has no value in a field that neither the worker nor this engine reads.

    A field that a later version adds for another engine would otherwise be ignored in silence. Works are made of
    requests that were checked.

    Args:
        request: the request.
        known: the fields that the engine reads.
        engine: its name, for the error.

    Raises:
        InvalidValue: it has one.
    """
    if not isinstance(request, ImageRequest):
        return
    for name in _DEFAULTS.keys() - WORKER_FIELDS - known:
        if getattr(request, name) != _DEFAULTS[name]:
            raise InvalidValue(f"{name}: engine {engine}, which serves this model, has no such parameter", param=name)


def check_adapters(request: Request, aliases: Collection[str]) -> None:
    """Check that a model has every LoRA adapter of a request. Raises InvalidValue."""
    chosen = request.request.adapters if isinstance(request, Work) else request.adapters
    for alias, _ in chosen:
        if alias not in aliases:
            known = ", ".join(aliases) or "none"
            raise InvalidValue(
                f"lora_alphas: {alias[:100]!r} is not an adapter of this model; it has: {known}", param="lora_alphas"
            )


def check_scheduler(request: Request, offered: frozenset[str]) -> None:
    """Check that a request names no scheduler, or one of `offered`.

    Raises:
        InvalidValue: it names another one.
    """
    if request.scheduler and request.scheduler not in offered:
        names = ", ".join(sorted(offered))
        raise InvalidValue(
            f"scheduler: {request.scheduler!r} is not served by this model; expected one of {names}", param="scheduler"
        )


def check_step_count(request: Request, profile: ModelProfile) -> None:
    """Check the number of steps against the timesteps that the model was trained with.

    Raises:
        InvalidValue: it is out of range.
    """
    steps, train = request.num_inference_steps, profile.scheduling.num_train_timesteps
    if steps < 1:
        raise InvalidValue(f"num_inference_steps is {steps}; it must be at least 1", param="num_inference_steps")
    if steps > train:
        raise InvalidValue(
            f"num_inference_steps is {steps}; it must be at most {train}, the timesteps the model was trained with",
            param="num_inference_steps",
        )


def check_step_spacing(request: Request, profile: ModelProfile) -> None:
    """Check that the library's schedule for this number of steps has no step too many.

    Raises:
        InvalidValue: it has one.
    """
    steps, scheduling = request.num_inference_steps, profile.scheduling
    train = scheduling.num_train_timesteps
    if scheduling.timestep_spacing != "trailing" or is_lcm(profile, request.scheduler):
        return
    if not runs_extra_step(steps, train):
        return
    near = sorted(
        (count for count in range(1, 2 * steps + 2) if not runs_extra_step(count, train)),
        key=lambda count: abs(count - steps),
    )
    raise InvalidValue(
        f"num_inference_steps is {steps}, which this model's timestep spacing does not allow; "
        f"use {' or '.join(str(count) for count in sorted(near[:2]))}",
        param="num_inference_steps",
    )


def runs_extra_step(num_inference_steps: int, num_train_timesteps: int) -> bool:
    """Return whether openvino_genai, at `timestep_spacing: trailing`, runs one step too many, at a timestep below zero.

    Its loop counts down in float32 from the number of training timesteps while above zero. For some step counts (9, 11,
    12, 18, ..., measured) the last subtraction leaves a positive remainder, and the extra step destroys the picture.
    """
    rest, step = np.float32(num_train_timesteps), np.float32(num_train_timesteps) / np.float32(num_inference_steps)
    for _ in range(num_inference_steps):
        rest = np.float32(rest - step)
    return bool(rest > 0)


def check_fixed_values(request: Request, profile: ModelProfile) -> None:
    """Check the values that the library fixes with its first picture: that of the warm-up, with the model's defaults.

    Raises:
        InvalidValue: the request needs another value.
    """
    if profile.traits.t5 is not None and request.max_sequence_length not in (0, profile.prompt_tokens):
        raise InvalidValue(
            f"max_sequence_length is {request.max_sequence_length}; this model allows only {profile.prompt_tokens}",
            param="max_sequence_length",
        )
    guided = profile.defaults.guidance_scale > 1
    if profile.traits.fixes_guidance and (request.guidance_scale > 1) != guided:
        bound = "above 1, because it was loaded with guidance" if guided else "at most 1, because it was loaded without"
        raise InvalidValue(
            f"guidance_scale is {request.guidance_scale:g}; for this model it must be {bound}", param="guidance_scale"
        )
