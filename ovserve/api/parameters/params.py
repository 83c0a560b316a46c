"""Fields and uploads to a frozen, validated request: every rule that needs no pixels.

    Form ──▶ gather (names: x, x[], x[k], repeated) ──▶ value of each by its kind ──▶ the operator's limits ──▶ exclusions

Whatever is wrong is told by the field's name, with the bound it broke.
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
from ovserve.api.parameters.values import check_range, expected, parse_value
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

FIDELITY = 0.7  # share of the model's own strength that `input_fidelity` = high leaves

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_EMPTY = frozenset(("", "null", "None", "undefined"))


@dataclass(frozen=True, slots=True)
class Parameters:
    """One validated request.

    Attributes:
        request: what a worker gets.
        model: whom it is for.
        stream, partial_images, response_format: how the answer is given.
        quality: low, medium or high, never auto.
        timeout_s: the deadline the client asked for, or the default.
        safety_identifier: the client's own name for the end user.
        moderation: whether the client asked for a check that no model here makes.
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
    """A form's fields and uploads by the name they mean."""

    values: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)  # field name: (as spelled, value)
    uploads: dict[str, list[Upload]] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        return name in self.values or name in self.uploads


# --- names ------------------------------------------------------------------------------------------------------------


def _meant(spelled: str) -> Field:
    """The field a name on the wire means. Raises UnknownParameter with the nearest known name."""
    match = _NAME.fullmatch(spelled)
    known = field_named(match[1]) if match else None
    if known is None:
        near = difflib.get_close_matches(spelled[:64], FIELDS, n=1, cutoff=0.7)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UnknownParameter(f"Unknown parameter: '{spelled[:200]}'.{hint}", param=spelled[:200])
    return known


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in _EMPTY)


def _gather(form: Form, endpoint: str) -> _Gathered:
    gathered = _Gathered()
    for spelled, value in form.fields:
        known = _meant(spelled)
        # A prompt may be the word "null", and an image that is no image is told so; JSON's null is nothing in any field.
        if _is_empty(value) and (value is None or known.name not in ("prompt", "image")):
            continue
        _check_taken(known, spelled, endpoint)
        gathered.values.setdefault(known.name, []).append((spelled, value))
    for upload in form.uploads:
        known = _meant(upload.name)
        _check_taken(known, upload.name, endpoint)
        if known.kind not in ("file", "files"):
            raise InvalidType(
                f"Invalid type for '{upload.name}': expected {expected(known)}, but got a file.", param=upload.name
            )
        gathered.uploads.setdefault(known.name, []).append(upload)
    return gathered


def _check_taken(known: Field, spelled: str, endpoint: str) -> None:
    if not known.served:
        raise UnsupportedParameter(f"'{spelled}' is not supported: {known.text}", param=spelled)
    if endpoint not in known.endpoints:
        told = {EDIT: "edits", GENERATION: "generations", VARIATION: "variations"}
        takers = " and ".join(f"images/{told[name]}" for name in told if name in known.endpoints)
        raise UnsupportedParameter(
            f"'{spelled}' is not taken by images/{told[endpoint]}; {takers} takes it.", param=spelled
        )


# --- values -----------------------------------------------------------------------------------------------------------


def _values(gathered: _Gathered, is_json: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Every given value by its field's first name, and how the client spelled it.

    A value may come twice, under one name or two, as long as it is the same.
    """
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    for name, entries in gathered.values.items():
        known = FIELDS[name]
        if known.kind in ("file", "files"):
            continue
        first = known.same_as or name
        for spelled, raw in entries:
            if spelled != name and SPELLINGS.get(spelled) != name:
                raise InvalidType(
                    f"Invalid type for '{spelled}': '{name}' takes {expected(known)}, not a list.", param=spelled
                )
            value = parse_value(known, spelled, raw, is_json)
            if first in values and values[first] != value:
                other = spellings[first]
                told = (
                    f"'{spelled}' = {raw} already exists"
                    if other == spelled
                    else f"'{spelled}' = {raw} contradicts '{other}'"
                )
                raise InvalidValue(f"{told} = {values[first]}: give one.", param=spelled)
            values[first], spellings[first] = value, spelled
    return values, spellings


# --- images -----------------------------------------------------------------------------------------------------------


def _refuse_text_images(gathered: _Gathered, is_json: bool) -> None:
    """An image must be a file, or in JSON a data URL: everything else is told what is wrong with it."""
    for name in ("image", "mask"):
        for spelled, value in gathered.values.get(name, ()):
            if _is_empty(value) or value == []:
                continue
            reference = value[0] if isinstance(value, list) and value else value
            reference = reference.get("image_url", reference) if isinstance(reference, dict) else reference
            if isinstance(reference, dict) and "file_id" in reference:
                raise UnsupportedParameter(
                    f"'{spelled}': files by id are not supported; send the image itself.", param=spelled
                )
            if isinstance(reference, str) and reference.startswith(("http://", "https://")):
                raise InvalidValue(
                    f"'{spelled}': addresses are not fetched; send the image itself or a data URL.", param=spelled
                )
            if is_json:
                raise InvalidType(f"Invalid type for '{spelled}': expected a data URL as image_url.", param=spelled)
            raise InvalidType(
                f"Invalid type for '{spelled}': expected a file, but got a string instead.", param=spelled
            )


def _images(
    gathered: _Gathered, model: ServedModel, settings: Settings
) -> tuple[list[Upload], Upload | None, list[ImageHead]]:
    images = gathered.uploads.get("image", [])
    masks = gathered.uploads.get("mask", [])
    if not images:
        raise MissingParameter("Missing required parameter: 'image'.", param="image")
    if len(images) > settings.max_images:
        raise InvalidValue(f"'image': {len(images)} images; at most {settings.max_images} are taken.", param="image")
    if len(masks) > 1:
        raise InvalidValue("'mask': more than one mask; it applies to the first image.", param="mask")
    heads = [read_head(upload.view(), upload.name, settings) for upload in images]
    if len(images) > 1:
        told = f"'image': {len(images)} images, but model '{model.name}' edits one: it takes no reference images."
        raise UnsupportedParameter(told, param=images[1].name)
    if masks:
        read_head(masks[0].view(), masks[0].name, settings)
    elif any(value != "auto" for _, value in gathered.values.get("mask_mode", ())):
        raise InvalidValue("'mask_mode' says how a 'mask' is read, and there is none.", param="mask_mode")
    return images, masks[0] if masks else None, heads


# --- the whole --------------------------------------------------------------------------------------------------------


def parse_parameters(
    form: Form, endpoint: str, path_model: str | None, catalog: Catalog, settings: Settings
) -> Parameters:
    """Validate one request.

    Args:
        form: the body's fields and uploads.
        endpoint: edit, generation or variation.
        path_model: the model named by the path, if it is.
        catalog: the models served now.
        settings: the server's limits.

    Raises:
        BadRequest and its kinds, ModelNotFound.
    """
    gathered = _gather(form, endpoint)
    values, spelled = _values(gathered, form.is_json)
    model = catalog.find(_model_name(values, path_model))
    _check_family(gathered, model)
    if endpoint != VARIATION and not values.get("prompt"):
        raise MissingParameter("Missing required parameter: 'prompt'.", param="prompt")
    _refuse_text_images(gathered, form.is_json)
    _check_limits(values, spelled, model)
    if "timeout_s" in values:
        check_range(spelled["timeout_s"], values["timeout_s"], None, settings.max_timeout_s)
    resolved = _resolve(values, model, settings)
    for rule in EXCLUSIONS:
        if rule.applies(resolved):
            raise InvalidValue(
                f"{rule.first_told} cannot go with {rule.second_told}.", param=spelled.get(rule.first, rule.first)
            )
    images: list[Upload] = []
    mask: Upload | None = None
    if endpoint != GENERATION:
        images, mask, heads = _images(gathered, model, settings)
        _check_task(model, mask, heads[0])
    elif "text2image" not in model.profile.tasks:
        raise BadRequest(
            f"Model '{model.name}' is an inpainting model: it cannot make a picture from a prompt alone.", param="model"
        )
    resolved["preferred_strength"] = _preferred_strength(resolved, model)
    if "num_inference_steps" not in values and endpoint != GENERATION:
        resolved["num_inference_steps"] = _enough_steps(endpoint, resolved, model, mask)
    _check_a_step_runs(values, resolved, spelled, model)
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
    """The record for the worker, from every field's value."""
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
    named: str | None = values.get("model")
    if path_model and named and named != path_model:
        raise InvalidValue(
            f"'model' = '{named[:200]}' contradicts the path, which names '{path_model[:200]}'.", param="model"
        )
    return named or path_model


def _check_family(gathered: _Gathered, model: ServedModel) -> None:
    for name, entries in gathered.values.items():
        known = FIELDS[name]
        if known.has is not None and not known.has(model.profile):
            told = f"'{entries[0][0]}' is not taken by model '{model.name}': it needs {known.needs}."
            raise UnsupportedParameter(told, param=entries[0][0])


def _check_limits(values: Mapping[str, Any], spelled: Mapping[str, str], model: ServedModel) -> None:
    """The operator's own minima and maxima, for what the request gives; defaults were checked at start."""
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
            check_range(spelled[name], values[name], low, high)
    size = values.get("size")
    if size:
        for side, limit in ((size.width, limits.max_resolution.width), (size.height, limits.max_resolution.height)):
            if side > limit:
                told = f"Invalid value for 'size': {size} is more than the maximum of {limits.max_resolution}."
                raise InvalidValue(told, param="size")


_PLAIN_DEFAULTS: dict[str, Any] = {
    "prompt": "", "negative_prompt": "", "prompt_2": "", "prompt_3": "", "negative_prompt_2": "", "negative_prompt_3": "",
    "mask_mode": "auto", "mask_blur": 0, "resize_mode": "crop", "n": 1, "scheduler": "", "max_sequence_length": 0,
    "truncate_prompt": False, "output_format": "png", "output_compression": 100, "background": "auto", "metadata": True,
    "partial_images": 0, "stream": False, "response_format": "b64_json", "user": "", "safety_identifier": "", "moderation": "",
    "input_fidelity": "", "strength": None,
}  # fmt: skip

_QUALITIES = {"auto": "high", "standard": "medium", "hd": "high", "xhigh": "high", "max": "high"}
# Share of the model's own steps where its directory declares no steps of its own, and the rest of a preset where it declares none:
# measured as how far pictures are from the exact ones and what they cost (docs/performance.md). An engine that has no such
# scheduler or shortcut makes the picture without.
_STEP_SHARES = {"low": 0.3, "medium": 0.5, "high": 1.0}
_PRESETS: dict[str, dict[str, Any]] = {
    "low": {"scheduler": "dpmpp_2m", "shortcuts": "guidance_until=0.6"},
    "medium": {"scheduler": "dpmpp_2m"},
    "high": {},
}


def _resolve(values: Mapping[str, Any], model: ServedModel, settings: Settings) -> dict[str, Any]:
    """Every field's value: the request's, else the quality preset's, else the model's, else the table's."""
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
    """`size`, or width and height, or the operator's default; None for the image's own. Raises InvalidValue."""
    size: Resolution | None = values.get("size")
    width, height = values.get("width"), values.get("height")
    default = model.limits.default_resolution
    if size:
        for name, side, own in (("width", width, size.width), ("height", height, size.height)):
            if side is not None and side != own:
                raise InvalidValue(f"'{name}' = {side} contradicts 'size' = {size}: give one.", param=name)
        return size
    if width is None and height is None:
        return default
    if width is not None and height is not None:
        return Resolution(width, height)
    if default is None:
        missing, given = ("height", "width") if height is None else ("width", "height")
        raise MissingParameter(f"Missing required parameter: '{missing}' goes with '{given}'.", param=missing)
    return Resolution(width or default.width, height or default.height)


def _check_task(model: ServedModel, mask: Upload | None, head: ImageHead) -> None:
    tasks = model.profile.tasks
    if mask is not None and "inpainting" not in tasks:
        raise UnsupportedParameter(f"'mask' is not taken by model '{model.name}': it cannot inpaint.", param="mask")
    if mask is None and "image2image" not in tasks and not ("inpainting" in tasks and head.may_be_clear):
        needed = "a mask, or an image with transparent pixels" if "inpainting" in tasks else "a prompt alone"
        raise MissingParameter(f"Model '{model.name}' works from {needed}: 'mask' is required.", param="mask")


def _preferred_strength(resolved: Mapping[str, Any], model: ServedModel) -> float | None:
    """What `input_fidelity` = high stands for; None without it. The worker knows whether the whole image is edited."""
    if resolved["input_fidelity"] != "high":
        return None
    least = min_strength_for(resolved["num_inference_steps"])
    preferred = max(model.profile.defaults.strength * FIDELITY, model.limits.min_strength, least)
    return min(preferred, model.limits.max_strength)


def _enough_steps(endpoint: str, resolved: Mapping[str, Any], model: ServedModel, mask: Upload | None) -> int:
    """The count of steps, which nobody asked for: raised until the edit runs one of them, if the limit allows that."""
    steps: int = resolved["num_inference_steps"]
    defaults = model.profile.defaults
    strength: float = resolved["strength"] or 0.0
    if resolved["strength"] is None and endpoint == VARIATION:
        strength = defaults.strength_variation
    elif resolved["strength"] is None and mask is not None:
        strength = defaults.strength_inpainting
    elif resolved["strength"] is None:  # holes in the image make it an inpainting; only the worker sees them
        strength = min(resolved["preferred_strength"] or defaults.strength, defaults.strength_inpainting)
    if is_lcm(model.profile, resolved["scheduler"]) or not steps_run(model.limits.max_num_inference_steps, strength):
        return steps
    return max(steps, min_steps_for(strength))


def _check_a_step_runs(
    values: Mapping[str, Any], resolved: Mapping[str, Any], spelled: Mapping[str, str], model: ServedModel
) -> None:
    """Raises InvalidValue. The model's own strengths, and LCM's rule, are the worker's to check."""
    strength, steps = resolved["strength"], resolved["num_inference_steps"]
    if strength is None or is_lcm(model.profile, resolved["scheduler"]) or steps_run(steps, strength):
        return
    # Where the count is left out, as many are run as this strength needs: only the limit stands against it.
    most = steps if "num_inference_steps" in values else model.limits.max_num_inference_steps
    told = (
        f"Invalid value for 'strength': {strength:g} of {most} steps leaves no step to run; "
        f"the smallest strength that works is {min_strength_for(most):g}."
    )
    raise InvalidValue(told, param=spelled.get("strength", "strength"))
