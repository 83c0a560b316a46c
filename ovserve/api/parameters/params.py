"""The parameters of one request: a form becomes one frozen, validated record. Checks every rule that needs no pixels.

    Form ──gather──▶ names and uploads ──validate──▶ given values ──resolve──▶ every field's value ──▶ ImageRequest

Each step is one module, and the table in `fields.py` says what it does with a field. Every error names the field, its
value and the limit that applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.api.exchange import Form
from ovserve.api.parameters.adapters import check_is_loaded, check_same_adapters, choose_adapters
from ovserve.api.parameters.fields import FIELDS
from ovserve.api.parameters.gather import Gathered, gather, refuse_unknown
from ovserve.api.parameters.resolve import Resolved, resolve, resolve_steps
from ovserve.api.parameters.uploads import Pictures, check_pictures, reject_text_images
from ovserve.api.parameters.validate import (
    Given,
    check_exclusions,
    check_features,
    check_fixed,
    check_limits,
    check_required,
    parse_values,
)
from ovserve.errors import ApiError, InvalidValue
from ovserve.models.catalog import Catalog, ServedModel
from ovserve.models.families import NO_GUIDANCE
from ovserve.settings.options import Settings
from ovserve.wire.request import ImageRequest

__all__ = ["Parameters", "parse_parameters"]

MAX_IGNORED = 20  # ignored names listed in one reply; further ones are dropped
MAX_IGNORED_CHARS = 100  # longer names are cut to this length
_FILLED = tuple((name, known.attribute) for name, known in FIELDS.items() if known.attribute)


@dataclass(frozen=True, slots=True)
class Parameters:
    """One validated request.

    Attributes:
        request: the record for the worker.
        model: the model that runs it.
        stream, partial_images, response_format: how to reply.
        quality: low, medium or high, never auto.
        timeout_s: the time limit from the request, or the default.
        keep_alive_s: how long the model stays loaded after its last job; None: as its options say.
        safety_identifier: the client's identifier of the end user.
        moderation: whether the client asked for moderation, which is not implemented.
        ignored: names of fields and uploads that were sent but have no effect on the picture, at most MAX_IGNORED.
    """

    request: ImageRequest
    model: ServedModel
    stream: bool
    partial_images: int
    response_format: str
    quality: str
    timeout_s: float
    keep_alive_s: float | None
    safety_identifier: str
    moderation: bool
    ignored: tuple[str, ...] = ()


def parse_parameters(
    form: Form,
    endpoint: str,
    path_model: str | None,
    catalog: Catalog,
    settings: Settings,
    *,
    requires_prompt: bool = True,
) -> Parameters:
    """Validate one request.

    Args:
        form: the body's fields and uploads.
        endpoint: edit, generation or variation.
        path_model: the model named in the path, or None.
        catalog: the models served now.
        settings: the server's limits.
        requires_prompt: whether an edit or generation without a prompt is rejected.

    Raises:
        BadRequest: or one of its subclasses; `param` is the field at fault.
        ModelNotFound: the request names an unknown model.
    """
    gathered = gather(form, endpoint)
    if gathered.unknown and not _ignores_unknown(catalog, gathered, path_model):
        refuse_unknown(gathered)
    given = parse_values(gathered, form.is_json)
    model = _find_model(catalog, given.values, path_model)
    check_features(gathered, model)
    if requires_prompt:
        check_required(given, endpoint)
    reject_text_images(gathered, form.is_json)
    check_limits(given, model, settings)
    requested = given.values.get("model") or path_model or catalog.default or model.name
    check_is_loaded(catalog, requested, model)
    adapters = choose_adapters(given, requested, model)
    given.values["model"] = given.values.get("model") or path_model or model.name
    resolved = resolve(given.values, model, settings)
    check_fixed(resolved.values, given, model)
    resolved.values["lora_alphas"] = adapters
    check_exclusions(resolved.values, given, model)
    pictures = check_pictures(gathered, endpoint, model, settings)
    steps = resolve_steps(endpoint, given, resolved, model, has_mask=pictures.mask is not None)
    values = resolved.values
    return Parameters(
        request=_record(endpoint, resolved, steps, pictures),
        model=model,
        stream=values["stream"],
        partial_images=values["partial_images"],
        response_format=values["response_format"],
        quality=values["quality"],
        timeout_s=values["timeout_s"],
        keep_alive_s=values["keep_alive"],
        safety_identifier=values["safety_identifier"] or values["user"],
        moderation=bool(values["moderation"]),
        ignored=(
            *pictures.ignored,
            *_without_effect(given, model),
            *(name[:MAX_IGNORED_CHARS] for name in gathered.unknown),
        )[:MAX_IGNORED],
    )


def _without_effect(given: Given, model: ServedModel) -> tuple[str, ...]:
    """Return the fields, as spelled, that many clients send on their own and that change nothing with this model."""
    names = []
    if model.profile.guidance == NO_GUIDANCE:
        names.append("guidance_scale")
    if not model.profile.takes_strength and model.profile.references <= 1:  # several keep each its own size
        names.append("input_fidelity")
    return tuple(given.spelled(name) for name in names if name in given.values)


def _ignores_unknown(catalog: Catalog, gathered: Gathered, path_model: str | None) -> bool:
    """Return whether the model that a request names, if it is one, ignores unknown fields."""
    named = next((value for _, value in gathered.values.get("model", ()) if isinstance(value, str)), None)
    try:
        return catalog.find(path_model or named).limits.unknown_fields == "ignore"
    except ApiError:  # the error for the model's name comes after that for the unknown field
        return False


def _find_model(catalog: Catalog, values: Mapping[str, Any], path_model: str | None) -> ServedModel:
    """Return the model that the field or the path names. Raises InvalidValue if they name different ones."""
    named: str | None = values.get("model")
    if path_model and named and catalog.name_of(named) != catalog.name_of(path_model):
        raise InvalidValue(
            f"model is {named[:200]!r}, but the path names {path_model[:200]!r}; send one of them.", param="model"
        )
    if path_model and named:
        check_same_adapters(catalog, named, path_model)
    return catalog.find(path_model or named)


def _record(endpoint: str, resolved: Resolved, steps: int, pictures: Pictures) -> ImageRequest:
    """Return the record for the worker: the table says which attribute each field fills."""
    values = {
        **resolved.values,
        "num_inference_steps": steps,
        "image": tuple(upload.blob for upload in pictures.images),
        "mask": pictures.mask.blob if pictures.mask else None,
    }
    return ImageRequest(
        task=endpoint,
        input_pixels=pictures.pixels,
        preferred_strength=resolved.preferred_strength,
        preferred_scheduler=resolved.preferred_scheduler,
        shortcuts=resolved.shortcuts,
        **{attribute: values[name] for name, attribute in _FILLED if values[name] is not None},
    )
