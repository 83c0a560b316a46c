"""Validation: the fields and uploads of a form to one frozen request. Checks every rule that needs no pixels.

    Form ──▶ gather (names: x, x[], x[k], repeated) ──▶ parse values by kind ──▶ the operator's limits ──▶ exclusions

Every error names the field, its value and the limit that applied.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovserve.api.exchange import Form, Upload
from ovserve.api.parameters.fields import EDIT, EXCLUSIONS, FIELDS, GENERATION, SPELLINGS, VARIATION, Field, field_named
from ovserve.api.parameters.imagehead import ImageHead, read_head
from ovserve.api.parameters.values import check_range, expected, parse_value, shown
from ovserve.errors import (
    BadRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnknownParameter,
    UnsupportedParameter,
)
from ovserve.models.catalog import Catalog, ServedModel
from ovserve.models.steps import is_lcm, min_steps_for, min_strength_for, steps_run
from ovserve.settings.options import Resolution, Settings
from ovserve.wire.request import SEEDS, ImageRequest

__all__ = ["Parameters", "parse_parameters"]

FIDELITY = 0.7  # `input_fidelity` = high multiplies the model's default strength by this

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_EMPTY = frozenset(("", "null", "None", "undefined"))  # texts that clients write for an absent value
_PATHS = {EDIT: "images/edits", GENERATION: "images/generations", VARIATION: "images/variations"}  # for messages


@dataclass(frozen=True, slots=True)
class Parameters:
    """One validated request.

    Attributes:
        request: the record for the worker.
        model: the model that runs it.
        stream, partial_images, response_format: form of the reply.
        quality: low, medium or high, never auto.
        timeout_s: the time limit from the request, or the default.
        safety_identifier: the client's identifier of the end user.
        moderation: whether the client asked for moderation, which is not implemented.
    """

    request: ImageRequest
    model: ServedModel
    stream: bool
    partial_images: int
    response_format: str
    quality: str
    timeout_s: float
    safety_identifier: str
    moderation: bool


@dataclass(slots=True)
class _Gathered:
    """A form's fields and uploads, grouped by field name."""

    values: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)  # field name: (name as spelled, value)
    uploads: dict[str, list[Upload]] = field(default_factory=dict)


# --- names ------------------------------------------------------------------------------------------------------------


def _find_field(spelled: str) -> Field:
    """Return the field for a name in a request. Raises UnknownParameter with the nearest known name."""
    match = _NAME.fullmatch(spelled)
    known = field_named(match[1]) if match else None
    if known is None:
        near = difflib.get_close_matches(spelled[:64], FIELDS, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "/openapi.json lists the known ones."
        raise UnknownParameter(f"Unknown parameter {spelled[:200]!r}; {hint}", param=spelled[:200])
    return known


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in _EMPTY)


def _gather(form: Form, endpoint: str) -> _Gathered:
    gathered = _Gathered()
    for spelled, value in form.fields:
        known = _find_field(spelled)
        # The prompt may be the word "null", and an image given as text gets an error of its own. JSON's null is an
        # absent value for every field.
        if _is_empty(value) and (value is None or known.name not in ("prompt", "image")):
            continue
        _check_endpoint(known, spelled, endpoint)
        gathered.values.setdefault(known.name, []).append((spelled, value))
    for upload in form.uploads:
        known = _find_field(upload.name)
        _check_endpoint(known, upload.name, endpoint)
        if known.kind not in ("file", "files"):
            raise InvalidType(f"{upload.name} is a file; expected {expected(known)}.", param=upload.name)
        gathered.uploads.setdefault(known.name, []).append(upload)
    return gathered


def _check_endpoint(known: Field, spelled: str, endpoint: str) -> None:
    if not known.served:
        raise UnsupportedParameter(f"{spelled} ({known.text}) is not supported; remove it.", param=spelled)
    if endpoint not in known.endpoints:
        supporting = " and ".join(path for name, path in _PATHS.items() if name in known.endpoints)
        raise UnsupportedParameter(
            f"{spelled} is not supported by {_PATHS[endpoint]}, only by {supporting}; remove it.", param=spelled
        )


# --- values -----------------------------------------------------------------------------------------------------------


def _parse_values(gathered: _Gathered, is_json: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse every value in the request.

    Returns:
        The values by field name (a second name, such as `rng_seed`, counts as its `same_as` field), and the names as
        the client spelled them.

    Raises:
        InvalidType: a value of another type, or a list for a field that takes one value.
        InvalidValue: a value out of range, or two different values for one field; equal values are accepted.
    """
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    sent: dict[str, Any] = {}  # the first value of each field as the client sent it, for messages
    for name, entries in gathered.values.items():
        known = FIELDS[name]
        if known.kind in ("file", "files"):
            continue
        first = known.same_as or name
        for spelled, raw in entries:
            if spelled != name and SPELLINGS.get(spelled) != name:
                raise InvalidType(
                    f"{spelled} is an element of a list; send {name} once, as {expected(known)}.", param=spelled
                )
            value = parse_value(known, spelled, raw, is_json)
            if first in values and values[first] != value:
                other = spellings[first]
                conflict = (
                    f"{spelled} was sent twice, as {shown(sent[first])} and as {shown(raw)}; send it once."
                    if other == spelled
                    else f"{spelled} is {shown(raw)}, but {other} is {shown(sent[first])}; send one of them."
                )
                raise InvalidValue(conflict, param=spelled)
            values[first], spellings[first], sent[first] = value, spelled, raw
    return values, spellings


# --- images -----------------------------------------------------------------------------------------------------------


def _reject_text_images(gathered: _Gathered, is_json: bool) -> None:
    """Raise an error that says what to send, for an image that is neither a file nor, in JSON, a data URL."""
    for name in ("image", "mask"):
        for spelled, value in gathered.values.get(name, ()):
            if _is_empty(value) or value == []:
                continue
            reference = value[0] if isinstance(value, list) and value else value
            reference = reference.get("image_url", reference) if isinstance(reference, dict) else reference
            if isinstance(reference, dict) and "file_id" in reference:
                raise UnsupportedParameter(
                    f"{spelled} refers to a file by id, which is not supported; send the image itself.", param=spelled
                )
            if isinstance(reference, str) and reference.startswith(("http://", "https://")):
                raise InvalidValue(
                    f"{spelled} is {shown(reference)}; URLs are not fetched, send the image itself or a data URL.",
                    param=spelled,
                )
            if is_json:
                raise InvalidType(f"{spelled} is {shown(reference)}; expected a data URL in image_url.", param=spelled)
            raise InvalidType(f"{spelled} is a string; expected a file (a part with a filename).", param=spelled)


def _check_images(
    gathered: _Gathered, endpoint: str, model: ServedModel, settings: Settings
) -> tuple[list[Upload], Upload | None, list[ImageHead]]:
    """Return the images, the mask and the images' headers after checking their number and headers."""
    images = gathered.uploads.get("image", [])
    masks = gathered.uploads.get("mask", [])
    if not images:
        raise MissingParameter(f"image is missing; {_PATHS[endpoint]} requires it.", param="image")
    if len(images) > settings.max_images:
        raise InvalidValue(
            f"image was sent {len(images)} times; this server allows at most {settings.max_images} images.",
            param="image",
        )
    if len(masks) > 1:
        raise InvalidValue(f"mask was sent {len(masks)} times; send one mask, for the first image.", param="mask")
    heads = [read_head(upload.view(), upload.name, settings) for upload in images]
    if len(images) > 1:
        raise UnsupportedParameter(
            f"image was sent {len(images)} times; model {model.name!r} takes one image and no reference images.",
            param=images[1].name,
        )
    if masks:
        read_head(masks[0].view(), masks[0].name, settings)
    for _, mask_mode in gathered.values.get("mask_mode", ()):
        if not masks and mask_mode != "auto":
            raise InvalidValue(
                f"mask_mode is {shown(mask_mode)}, but no mask was sent; send a mask, or leave mask_mode out.",
                param="mask_mode",
            )
    return images, masks[0] if masks else None, heads


# --- the request ------------------------------------------------------------------------------------------------------


def parse_parameters(
    form: Form, endpoint: str, path_model: str | None, catalog: Catalog, settings: Settings
) -> Parameters:
    """Validate one request.

    Args:
        form: the body's fields and uploads.
        endpoint: edit, generation or variation.
        path_model: the model named in the path, or None.
        catalog: the models served now.
        settings: the server's limits.

    Raises:
        BadRequest: or one of its subclasses; `param` is the field at fault.
        ModelNotFound: the request names an unknown model.
    """
    gathered = _gather(form, endpoint)
    values, spelled = _parse_values(gathered, form.is_json)
    model = catalog.find(_model_name(values, path_model))
    _check_features(gathered, model)
    if endpoint != VARIATION and not values.get("prompt"):
        raise MissingParameter(f"prompt is missing or empty; {_PATHS[endpoint]} requires it.", param="prompt")
    _reject_text_images(gathered, form.is_json)
    _check_limits(values, spelled, model)
    if "timeout_s" in values:
        check_range(spelled["timeout_s"], values["timeout_s"], None, settings.max_timeout_s, "this server")
    resolved = _resolve(values, model, settings)
    for rule in EXCLUSIONS:
        if rule.applies(resolved):
            raise InvalidValue(
                f"{rule.first_value} cannot be combined with {rule.second_value}; change one of them.",
                param=spelled.get(rule.first, rule.first),
            )
    images: list[Upload] = []
    mask: Upload | None = None
    if endpoint != GENERATION:
        images, mask, heads = _check_images(gathered, endpoint, model, settings)
        _check_task(model, mask, heads[0])
    elif "text2image" not in model.profile.tasks:
        raise BadRequest(
            f"The model {model.name!r} is an inpainting model and needs an image; use images/edits.",
            param="model",
        )
    resolved["preferred_strength"] = _preferred_strength(resolved, model)
    if "num_inference_steps" not in values and endpoint != GENERATION:
        resolved["num_inference_steps"] = _default_steps(endpoint, resolved, model, mask)
    _check_strength_runs_a_step(values, resolved, spelled, model)
    request = _request(endpoint, resolved, images, mask)
    return Parameters(
        request=request,
        model=model,
        stream=resolved["stream"],
        partial_images=resolved["partial_images"],
        response_format=resolved["response_format"],
        quality=resolved["quality"],
        timeout_s=resolved["timeout_s"],
        safety_identifier=resolved["safety_identifier"] or resolved["user"],
        moderation=bool(resolved["moderation"]),
    )


def _request(endpoint: str, resolved: Mapping[str, Any], images: Sequence[Upload], mask: Upload | None) -> ImageRequest:
    """Return the record for the worker, from every field's value."""
    size = resolved["size"] or Resolution(0, 0)
    return ImageRequest(
        task=endpoint,
        prompt=resolved["prompt"],
        negative_prompt=resolved["negative_prompt"],
        prompt_2=resolved["prompt_2"],
        prompt_3=resolved["prompt_3"],
        negative_prompt_2=resolved["negative_prompt_2"],
        negative_prompt_3=resolved["negative_prompt_3"],
        images=tuple(upload.blob for upload in images),
        mask=mask.blob if mask else None,
        mask_mode=resolved["mask_mode"],
        mask_blur=resolved["mask_blur"],
        width=size.width,
        height=size.height,
        resize_mode=resolved["resize_mode"],
        n=resolved["n"],
        seed=resolved["seed"],
        num_inference_steps=resolved["num_inference_steps"],
        guidance_scale=resolved["guidance_scale"],
        strength=resolved["strength"],
        preferred_strength=resolved["preferred_strength"],
        scheduler=resolved["scheduler"],
        preferred_scheduler=resolved["preferred_scheduler"],
        max_sequence_length=resolved["max_sequence_length"],
        truncate_prompt=resolved["truncate_prompt"],
        output_format=resolved["output_format"],
        output_compression=resolved["output_compression"],
        background=resolved["background"],
        metadata=resolved["metadata"],
        partial_images=resolved["partial_images"],
        progress=resolved["stream"],
        shortcuts=resolved["shortcuts"],
        quality=resolved["quality"],
    )


def _model_name(values: Mapping[str, Any], path_model: str | None) -> str | None:
    """Return the model that the field or the path names; None for neither. Raises InvalidValue if they differ."""
    named: str | None = values.get("model")
    if path_model and named and named != path_model:
        raise InvalidValue(
            f"model is {named[:200]!r}, but the path names {path_model[:200]!r}; send one of them.", param="model"
        )
    return named or path_model


def _check_features(gathered: _Gathered, model: ServedModel) -> None:
    for name, entries in gathered.values.items():
        known = FIELDS[name]
        if known.has is not None and not known.has(model.profile):
            spelled = entries[0][0]
            raise UnsupportedParameter(
                f"{spelled} needs {known.needs}, which model {model.name!r} does not have; remove it.", param=spelled
            )


def _check_limits(values: Mapping[str, Any], spelled: Mapping[str, str], model: ServedModel) -> None:
    """Check the values in the request against the operator's limits; defaults were checked when the server started."""
    limits = model.limits
    bounds = (
        ("n", 1, limits.max_num_images_per_prompt),
        ("num_inference_steps", 1, limits.max_num_inference_steps),
        ("guidance_scale", 0, limits.max_guidance_scale),
        ("strength", limits.min_strength, limits.max_strength),
        ("width", 1, limits.max_resolution.width),
        ("height", 1, limits.max_resolution.height),
    )
    for name, low, high in bounds:
        if name in values:
            check_range(spelled[name], values[name], low, high, "this model")
    size = values.get("size")
    if size:
        for side, limit in ((size.width, limits.max_resolution.width), (size.height, limits.max_resolution.height)):
            if side > limit:
                raise InvalidValue(f"size is {size}; this model allows at most {limits.max_resolution}.", param="size")


_PLAIN_DEFAULTS: dict[str, Any] = {
    "prompt": "", "prompt_2": "", "prompt_3": "", "negative_prompt": "", "negative_prompt_2": "", "negative_prompt_3": "",
    "mask_mode": "auto", "mask_blur": 0, "resize_mode": "crop", "strength": None, "input_fidelity": "",
    "n": 1, "scheduler": "", "max_sequence_length": 0, "truncate_prompt": False,
    "output_format": "png", "output_compression": 100, "background": "auto", "metadata": True,
    "response_format": "b64_json", "stream": False, "partial_images": 0,
    "user": "", "safety_identifier": "", "moderation": "",
}  # fmt: skip

_QUALITIES = {"auto": "high", "standard": "medium", "hd": "high", "xhigh": "high", "max": "high"}
# For a model that declares no presets: the share of its default steps, and the rest of the preset. The values come from
# measured differences to the exact pictures and measured times (docs/performance.md). An engine without such a
# scheduler or shortcut ignores it.
_STEP_SHARES = {"low": 0.3, "medium": 0.5, "high": 1.0}
_PRESETS: dict[str, dict[str, Any]] = {
    "low": {"scheduler": "dpmpp_2m", "shortcuts": "guidance_until=0.6"},
    "medium": {"scheduler": "dpmpp_2m"},
    "high": {},
}


def _resolve(values: Mapping[str, Any], model: ServedModel, settings: Settings) -> dict[str, Any]:
    """Return every field's value: from the request, else the quality preset, else the model, else the plain default."""
    defaults = model.profile.defaults
    named = values.get("quality", "auto")
    quality = _QUALITIES.get(named, named)
    preset = model.profile.presets.get(quality, _PRESETS[quality])
    own = defaults.num_inference_steps
    share = max(min(2, own), round(own * _STEP_SHARES[quality]))
    return {
        **_PLAIN_DEFAULTS,
        "timeout_s": settings.default_timeout_s,
        "guidance_scale": float(preset.get("guidance_scale", defaults.guidance_scale)),
        "num_inference_steps": int(preset.get("num_inference_steps", share)),
        "shortcuts": str(preset.get("shortcuts", "")),
        "preferred_scheduler": str(preset.get("scheduler", "")),
        **values,
        "seed": values["seed"] % SEEDS if values.get("seed", -1) >= 0 else secrets.randbelow(SEEDS),
        "size": _resolve_size(values, model),
        "quality": quality,
    }


def _resolve_size(values: Mapping[str, Any], model: ServedModel) -> Resolution | None:
    """Return `size`, or width and height, or the operator's default; None for the size of the image.

    Raises:
        InvalidValue: `size` differs from width or height.
        MissingParameter: only one side is given, and the operator has set no default size.
    """
    size: Resolution | None = values.get("size")
    width, height = values.get("width"), values.get("height")
    default = model.limits.default_resolution
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
        missing, given = ("height", "width") if height is None else ("width", "height")
        raise MissingParameter(f"{missing} is missing; send it together with {given}, or use size.", param=missing)
    return Resolution(width or default.width, height or default.height)


def _check_task(model: ServedModel, mask: Upload | None, head: ImageHead) -> None:
    tasks = model.profile.tasks
    if mask is not None and "inpainting" not in tasks:
        raise UnsupportedParameter(f"mask is not supported: model {model.name!r} cannot inpaint.", param="mask")
    if mask is None and "image2image" not in tasks and not ("inpainting" in tasks and head.may_be_transparent):
        if "inpainting" not in tasks:
            raise MissingParameter(
                f"The model {model.name!r} cannot edit images, with or without a mask; use images/generations.",
                param="mask",
            )
        raise MissingParameter(
            f"mask is missing; model {model.name!r} only inpaints: send a mask, or an image with transparent pixels.",
            param="mask",
        )


def _preferred_strength(resolved: Mapping[str, Any], model: ServedModel) -> float | None:
    """Return the strength for `input_fidelity` = high, else None.

    Only the worker knows whether the whole image is edited, the case in which it applies.
    """
    if resolved["input_fidelity"] != "high":
        return None
    one_step = min_strength_for(resolved["num_inference_steps"])
    preferred = max(model.profile.defaults.strength * FIDELITY, model.limits.min_strength, one_step)
    return min(preferred, model.limits.max_strength)


def _default_steps(endpoint: str, resolved: Mapping[str, Any], model: ServedModel, mask: Upload | None) -> int:
    """Return the step count for an edit that names none.

    It is the default, raised until the edit runs one step, if the operator's limit allows that.
    """
    steps: int = resolved["num_inference_steps"]
    defaults = model.profile.defaults
    strength: float = resolved["strength"] or 0.0
    if resolved["strength"] is None and endpoint == VARIATION:
        strength = defaults.strength_variation
    elif resolved["strength"] is None and mask is not None:
        strength = defaults.strength_inpainting
    elif resolved["strength"] is None:  # transparent pixels would make it an inpainting, but only the worker sees them
        strength = min(resolved["preferred_strength"] or defaults.strength, defaults.strength_inpainting)
    if is_lcm(model.profile, resolved["scheduler"]) or not steps_run(model.limits.max_num_inference_steps, strength):
        return steps
    return max(steps, min_steps_for(strength))


def _check_strength_runs_a_step(
    values: Mapping[str, Any], resolved: Mapping[str, Any], spelled: Mapping[str, str], model: ServedModel
) -> None:
    """Raise InvalidValue if the requested strength runs no step.

    The worker checks the model's default strengths, and LCM's rule.
    """
    strength, steps = resolved["strength"], resolved["num_inference_steps"]
    if strength is None or is_lcm(model.profile, resolved["scheduler"]) or steps_run(steps, strength):
        return
    # If the request names no step count, it was raised as far as the limit allows.
    count = steps if "num_inference_steps" in values else model.limits.max_num_inference_steps
    raise InvalidValue(
        f"strength is {strength:g}, which runs none of {count} steps; use at least {min_strength_for(count):g}.",
        param=spelled.get("strength", "strength"),
    )
