"""Validation by the table: types, the API's and the operator's bounds, what the model has, and combinations."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ovserve.api.parameters.fields import EXCLUSIONS, FIELDS, SPELLINGS
from ovserve.api.parameters.gather import PATHS, Gathered
from ovserve.api.parameters.values import check_range, expected, parse_value, parse_weights, shown
from ovserve.errors import InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from ovserve.models.catalog import ServedModel
from ovserve.settings.options import Resolution, Settings

__all__ = [
    "Given", "check_exclusions", "check_features", "check_fixed", "check_limits", "check_required", "parse_values",
]  # fmt: skip

_REQUIRED = tuple(known for known in FIELDS.values() if known.required and known.kind not in ("file", "files"))
_LIMITED = tuple((known, known.limit) for known in FIELDS.values() if known.limit is not None)


@dataclass(slots=True)
class Given:
    """The values that a request gives.

    Attributes:
        values: parsed values by field name; a second name, such as `rng_seed`, counts as its `same_as` field.
        spellings: the same fields' names as the client spelled them, for messages.
    """

    values: dict[str, Any] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)

    def spelled(self, name: str) -> str:
        """Return a field's name as the client spelled it; the name itself if the request does not give the field."""
        return self.spellings.get(name, name)


def parse_values(gathered: Gathered, is_json: bool) -> Given:
    """Parse every value of a request and check it against the API's bounds.

    Raises:
        InvalidType: a value of another type, or a list for a field that takes one value.
        InvalidValue: a value out of range, or two different values for one field; equal values are accepted.
    """
    given = Given()
    sent: dict[str, Any] = {}  # the first value of each field as the client sent it, for messages
    for name, entries in gathered.values.items():
        known = FIELDS[name]
        if known.kind in ("file", "files"):
            continue
        first = known.same_as or name
        if known.kind == "object":
            given.values[name], given.spellings[name] = parse_weights(known, entries, is_json), entries[0][0]
            continue
        for spelled, raw in entries:
            if spelled != name and SPELLINGS.get(spelled) != name:
                raise InvalidType(
                    f"{spelled} is an element of a list; send {name} once, as {expected(known)}.", param=spelled
                )
            value = parse_value(known, spelled, raw, is_json)
            if first in given.values and given.values[first] != value:
                other = given.spellings[first]
                conflict = (
                    f"{spelled} was sent twice, as {shown(sent[first])} and as {shown(raw)}; send it once."
                    if other == spelled
                    else f"{spelled} is {shown(raw)}, but {other} is {shown(sent[first])}; send one of them."
                )
                raise InvalidValue(conflict, param=spelled)
            given.values[first], given.spellings[first], sent[first] = value, spelled, raw
    return given


def check_features(gathered: Gathered, model: ServedModel) -> None:
    """Raise UnsupportedParameter for a field that needs a feature which the model does not have."""
    for name, entries in gathered.values.items():
        known = FIELDS[name]
        if known.has is not None and not known.has(model.profile):
            spelled = entries[0][0]
            raise UnsupportedParameter(
                f"{spelled} needs {known.needs}, which model {model.name!r} does not have; remove it.", param=spelled
            )


def check_required(given: Given, endpoint: str) -> None:
    """Raise MissingParameter for a required value that is missing or empty; `uploads.py` checks required files."""
    for known in _REQUIRED:
        if endpoint in known.required and not given.values.get(known.name):
            message = f"{known.name} is missing or empty; {PATHS[endpoint]} requires it."
            raise MissingParameter(message, param=known.name)


def check_limits(given: Given, model: ServedModel, settings: Settings) -> None:
    """Check the given values against the operator's limits, then the API's; defaults were checked at start.

    Raises:
        InvalidValue: a value is out of bounds.
    """
    for known, limit in _LIMITED:
        value = given.values.get(known.name)
        if value is None:
            continue
        low, high = limit(model.limits, settings)
        spelled = given.spelled(known.name)
        if isinstance(high, Resolution):
            if value.width > high.width or value.height > high.height:
                raise InvalidValue(f"{spelled} is {value}; {known.limited_by} allows at most {high}.", param=spelled)
        else:
            check_range(spelled, value, low, high, known.limited_by)
            check_range(spelled, value, known.low, known.high, "the API")


def check_fixed(values: Mapping[str, Any], given: Given, model: ServedModel) -> None:
    """Check size, number and guidance of a request for a model with the option `resolution`.

    Args:
        values: the value of every field.
        given: the values of the request.
        model: the model.

    Raises:
        InvalidValue: a value is not the one that the options fix.
    """
    allowed, count = model.limits.resolution, model.limits.fixed_num_images
    if not allowed:
        return
    size = Resolution(values["width"], values["height"])
    if size not in allowed:
        spelled = next((given.spelled(name) for name in ("size", "width", "height") if name in given.values), "size")
        listed = ", ".join(map(str, allowed))
        raise InvalidValue(f"{spelled}: {size} is not one of the sizes of resolution: {listed}.", param=spelled)
    if values["n"] != count:
        spelled = given.spelled("n")
        raise InvalidValue(
            f"{spelled} is {values['n']}; num_images_per_prompt of this model is {count}.", param=spelled
        )
    fixed = model.fixed_guidance_scale
    if _single(values["guidance_scale"]) != _single(fixed):
        spelled = given.spelled("guidance_scale")
        raise InvalidValue(
            f"{spelled} is {values['guidance_scale']:g}; the only guidance scale of this model is {fixed:g}.",
            param=spelled,
        )


def _single(value: float) -> float:
    """Return a number as float32, in which a model takes it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def check_exclusions(values: Mapping[str, Any], given: Given, model: ServedModel) -> None:
    """Raise InvalidValue for two values that cannot be combined; `values` has the value of every field."""
    for rule in EXCLUSIONS:
        if rule.applies(values, model.profile):
            raise InvalidValue(
                f"{rule.first_value} cannot be combined with {rule.second_value}; change one of them.",
                param=given.spelled(rule.first),
            )
