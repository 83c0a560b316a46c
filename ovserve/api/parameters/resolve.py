"""The value of every field: from the request, else from the model and the settings, else the table's default."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ovserve.api.parameters.fields import FIELDS, GENERATION, VARIATION
from ovserve.api.parameters.validate import Given
from ovserve.errors import InvalidValue, MissingParameter
from ovserve.models.catalog import ServedModel
from ovserve.models.steps import (
    default_strength,
    denoising_steps,
    is_lcm,
    min_strength_for,
    raise_steps,
    smallest_strength,
)
from ovserve.settings.options import Resolution, Settings
from ovserve.wire.request import SEEDS

__all__ = ["Resolved", "resolve", "resolve_steps"]

FIDELITY = 0.7  # `input_fidelity` = high multiplies the model's default strength by this
_DEFAULTS = {name: known.default for name, known in FIELDS.items() if known.served}
_QUALITIES = {"auto": "high", "standard": "medium", "hd": "high", "xhigh": "high", "max": "high"}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The values of a request.

    Attributes:
        values: the value of every field by its name; None where the record's own default applies.
        preferred_strength, preferred_scheduler, shortcuts: attributes of the record that no field fills.
    """

    values: dict[str, Any]
    preferred_strength: float | None
    preferred_scheduler: str
    shortcuts: str


def resolve(given: Mapping[str, Any], model: ServedModel, settings: Settings) -> Resolved:
    """Return the value of every field: the given one, else the one of the model or the settings, else the default.

    Raises:
        InvalidValue: `size` differs from width or height.
        MissingParameter: only one side is given, and the operator has set no default size.
    """
    named = given.get("quality", "auto")
    quality = _QUALITIES.get(named, named)
    preset = model.profile.preset(quality, given.get("scheduler") or "")
    size = _resolve_size(given, model.limits.default_resolution)
    values = {
        **_DEFAULTS,
        "timeout_s": settings.default_timeout_s,
        "truncate_prompt": model.cuts_prompt,
        "response_format": _default_response_format(given, model),
        "num_inference_steps": preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale,
        **_fixed_values(model),
        **given,
        "quality": quality,
        "seed": given["seed"] % SEEDS if given.get("seed", -1) >= 0 else secrets.randbelow(SEEDS),
        "width": size.width if size else None,
        "height": size.height if size else None,
    }
    return Resolved(values, _preferred_strength(values, model), preset.scheduler, preset.shortcuts)


def _fixed_values(model: ServedModel) -> dict[str, Any]:
    """Return the values that a model with the option `resolution` fixes."""
    count = model.limits.fixed_num_images
    return {} if count is None else {"n": count, "guidance_scale": model.fixed_guidance_scale}


def _default_response_format(given: Mapping[str, Any], model: ServedModel) -> str:
    """Return the form of pictures in a reply whose request does not choose one; `model` is as the request names it."""
    chosen = model.limits.default_response_format
    if given.get("stream"):
        return "b64_json"
    if chosen == "openai":
        return "url" if given.get("model", "").startswith("dall-e-") else "b64_json"
    return chosen


def _resolve_size(given: Mapping[str, Any], default: Resolution | None) -> Resolution | None:
    """Return `size`, or width and height, or the operator's default; None for the size of the image."""
    size: Resolution | None = given.get("size")
    width, height = given.get("width"), given.get("height")
    if size:
        for name, side, own in (("width", width, size.width), ("height", height, size.height)):
            if side is not None and side != own:
                raise InvalidValue(f"{name} is {side}, but size is {size}; send one of them.", param=name)
        return size
    if width is None and height is None:
        return default
    if width is not None and height is not None:
        return Resolution(width, height)
    if default is None:
        missing, sent = ("height", "width") if height is None else ("width", "height")
        raise MissingParameter(f"{missing} is missing; send it together with {sent}, or use size.", param=missing)
    return Resolution(width or default.width, height or default.height)


def _preferred_strength(values: Mapping[str, Any], model: ServedModel) -> float | None:
    """Return the strength for `input_fidelity` = high, else None.

    Only the worker knows whether the whole image is edited, the case in which it applies.
    """
    if values["input_fidelity"] != "high":
        return None
    one_step = min_strength_for(values["num_inference_steps"])
    preferred = max(model.profile.defaults.strength * FIDELITY, model.limits.min_strength, one_step)
    return min(preferred, model.limits.max_strength)


def resolve_steps(endpoint: str, given: Given, resolved: Resolved, model: ServedModel, *, has_mask: bool) -> int:
    """Return the step count; an edit that names none runs at least one step, if the operator's limit allows that.

    Raises:
        InvalidValue: the given strength runs no step, and is not 0. The worker checks the model's default strengths,
            and LCM's rule.
    """
    steps: int = resolved.values["num_inference_steps"]
    strength: float | None = resolved.values["strength"]
    scheduler, limit = resolved.values["scheduler"] or "", model.limits.max_num_inference_steps
    is_given = "num_inference_steps" in given.values
    if endpoint != GENERATION and not is_given:
        weakest = strength if strength is not None else _weakest_default_strength(endpoint, resolved, model, has_mask)
        steps = raise_steps(model.profile, scheduler, steps, weakest, limit)
    if not strength or is_lcm(model.profile, scheduler):
        return steps
    if not denoising_steps(model.profile, scheduler, steps, strength):
        # If the request names no step count, it was raised as far as the limit allows.
        count = steps if is_given else limit
        smallest = smallest_strength(model.profile, scheduler, count)
        raise InvalidValue(
            f"strength is {strength:g}, which runs none of {count} steps; use at least {smallest:g}.",
            param=given.spelled("strength"),
        )
    return steps


def _weakest_default_strength(endpoint: str, resolved: Resolved, model: ServedModel, has_mask: bool) -> float:
    """Return the default strength of a request; the lower one where only the worker sees which of two applies.

    Transparent pixels make an edit without a mask an inpainting.
    """
    is_variation = endpoint == VARIATION
    strength = partial(
        default_strength, model.profile, is_variation=is_variation, preferred=resolved.preferred_strength
    )
    if is_variation or has_mask:
        return strength(is_masked=has_mask)
    return min(strength(is_masked=False), strength(is_masked=True))
