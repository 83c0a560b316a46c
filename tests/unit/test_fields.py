"""The table of request fields against the record that it fills."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from ovserve.api.parameters.fields import FIELDS, Field
from ovserve.wire.request import ImageRequest
from tests.forms import edit

RECORD = {attribute.name: attribute for attribute in dataclasses.fields(ImageRequest)}
COMPUTED = {
    "input_pixels",
    "task",
    "preferred_strength",
    "preferred_scheduler",
    "shortcuts",
}  # no field of a request fills them


def test_every_attribute_of_the_record_is_filled_once() -> None:
    filled = Counter(field.attribute for field in FIELDS.values() if field.attribute)
    assert set(filled) == RECORD.keys() - COMPUTED
    assert set(filled.values()) == {1}


def test_named_attributes_exist() -> None:
    assert {field.record for field in FIELDS.values() if field.record} <= RECORD.keys()


@pytest.mark.parametrize("field", [field for field in FIELDS.values() if field.attribute], ids=lambda field: field.name)
def test_defaults_of_table_and_record_are_equal(field: Field) -> None:
    """A record leaves out defaults when it travels, so a different default would only make it longer."""
    own = RECORD[field.attribute].default
    assert field.default is None or own is dataclasses.MISSING or field.default == own or field.name == "quality"


def test_request_with_only_defaults_keeps_those_of_the_record() -> None:
    request = edit(truncate_prompt="refuse").request
    by_model = {"task", "prompt", "images", "num_inference_steps", "guidance_scale", "seed", "quality", "input_pixels"}
    for name, attribute in RECORD.items():
        assert name in by_model or getattr(request, name) == attribute.default, name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("n", "1"),
        ("stream", "false"),
        ("metadata", "true"),
        ("size", "auto"),
        ("strength", "the model's"),
        ("timeout_s", "the option `default_timeout_s`"),
        ("mask", ""),
        ("user", ""),
    ],
)
def test_default_is_shown_as_a_request_would_have_it(name: str, shown: str) -> None:
    assert FIELDS[name].shown_default == shown
