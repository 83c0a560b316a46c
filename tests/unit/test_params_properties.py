"""Validation, for any form, any JSON and any combination of valid values (Hypothesis)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.parameters.fields import EDIT, FIELDS, GENERATION, VARIATION
from ovserve.api.parameters.params import parse_parameters
from ovserve.errors import ApiError, BadRequest, InvalidValue
from ovserve.settings.options import Settings
from tests.forms import IMAGE, FakeForm, catalog, edit

SETTINGS = Settings()

NAMES = st.sampled_from([*FIELDS, "image[]", "n[]", "svg[model]", "x", "[", "prompt[a][b]"]) | st.text(max_size=8)
VALUES = st.text(max_size=12) | st.sampled_from(["1", "true", "auto", "0.5", "png"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=2)
)


@given(
    fields=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    with_image=st.booleans(),
    endpoint=st.sampled_from([EDIT, GENERATION, VARIATION]),
)
def test_any_form_is_accepted_or_rejected_with_a_param(
    fields: list[tuple[str, str]], with_image: bool, endpoint: str
) -> None:
    form = FakeForm(fields, (IMAGE,) if with_image else ())
    try:
        parse_parameters(form, endpoint, None, catalog(), SETTINGS)
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.param is not None
        assert error.param in error.message or repr(error.param) in error.message


@given(fields=st.dictionaries(NAMES, JSON, max_size=6), endpoint=st.sampled_from([EDIT, GENERATION]))
def test_any_json_is_accepted_or_rejected_with_a_param(fields: dict[str, Any], endpoint: str) -> None:
    try:
        parse_parameters(FakeForm(list(fields.items()), (), is_json=True), endpoint, None, catalog(), SETTINGS)
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.param is not None
        assert error.param in error.message or repr(error.param) in error.message


# Valid form values of each field. Left out: second names for one value (size and width, n and num_images_per_prompt).
VALID: dict[str, st.SearchStrategy[str]] = {
    "n": st.integers(1, 10).map(str),
    "size": st.sampled_from(["auto", "64x64", "4096x1", "301x77"]),
    "output_compression": st.integers(0, 100).map(str),
    "partial_images": st.integers(0, 3).map(str),
    "num_inference_steps": st.integers(10, 100).map(str),
    "guidance_scale": st.floats(0, 50).map(str),
    "strength": st.floats(0.3, 1).map(str),  # runs a step even with the four steps of low quality
    "seed": st.integers(0, 2**64 - 1).map(str),
    "mask_blur": st.integers(0, 256).map(str),
    "mask_padding": st.integers(0, 4096).map(str),
    "keep_alive": st.floats(0, SETTINGS.keep_alive_max_s).map(str),
    "timeout_s": st.floats(0.01, SETTINGS.max_timeout_s).map(str),
    "user": st.text(max_size=20),
    "safety_identifier": st.text(max_size=20),
    "negative_prompt": st.text(max_size=20),
    **{
        name: st.sampled_from(field.choices)
        for name, field in FIELDS.items()
        if field.kind == "choice" and field.served and not field.same_as
    },
    **{name: st.sampled_from(["true", "False", "1", "0"]) for name, field in FIELDS.items() if field.kind == "boolean"},
}
FORBIDDEN = {
    frozenset(("response_format", "stream")): lambda v: v.get("response_format") == "url" and on(v, "stream"),
    frozenset(("partial_images", "stream")): lambda v: int(v.get("partial_images", 0)) > 0 and not on(v, "stream"),
    frozenset(("background", "output_format")): lambda v: (
        v.get("background") == "transparent" and v.get("output_format") == "jpeg"
    ),
    # No mask is sent here.
    frozenset(("mask_mode", "mask")): lambda v: v.get("mask_mode", "auto") not in ("auto", "none"),
    frozenset(("mask_invert", "mask")): lambda v: on(v, "mask_invert"),
    frozenset(("mask_padding", "mask_area")): lambda v: (
        int(v.get("mask_padding", 0)) > 0 and v.get("mask_area", "whole") == "whole"
    ),
    frozenset(("negative_prompt", "guidance_scale")): lambda v: (
        v.get("negative_prompt", "") not in ("", "null", "None", "undefined") and float(v.get("guidance_scale", 3)) <= 1
    ),
}


def on(values: dict[str, str], name: str) -> bool:
    return values.get(name, "0").lower() in ("true", "1")


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, str]:
    names = draw(st.sets(st.sampled_from(sorted(VALID)), max_size=len(VALID)))
    return {name: draw(VALID[name]) for name in sorted(names)}


def test_table_of_valid_values_is_complete() -> None:
    left_out = {"model", "prompt", "image", "mask", "width", "height", "lora_alphas"}
    taken = {
        name
        for name, field in FIELDS.items()
        if field.served
        and not field.same_as
        and EDIT in field.endpoints
        and (field.has is None or name in ("negative_prompt", "strength"))
    }
    assert taken - left_out == set(VALID)


@given(values=combinations())
def test_allowed_combinations_are_accepted_and_others_name_both_fields(values: dict[str, str]) -> None:
    broken = [names for names, applies in FORBIDDEN.items() if applies(values)]
    try:
        edit(*values.items())
    except InvalidValue as error:
        assert any(all(name in error.message for name in names) for names in broken), error.message
    else:
        assert not broken


@given(
    values=combinations(),
    name=st.sampled_from(sorted(set(VALID) - {"user", "safety_identifier", "negative_prompt"})),
    wrong=st.sampled_from(["-2", "\x00", "1e99", "yes", "[]"]),
)
def test_single_invalid_field_is_named(values: dict[str, str], name: str, wrong: str) -> None:
    with pytest.raises(BadRequest) as caught:
        edit(*{**values, name: wrong}.items())
    assert caught.value.param == name
