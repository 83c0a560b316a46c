"""The field `lora_alphas` and the adapters of a request, without a worker."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.parameters.fields import GENERATION
from ovserve.api.parameters.params import Parameters, parse_parameters
from ovserve.errors import ApiError, InvalidType, InvalidValue, NotReady, UnsupportedParameter
from ovserve.models.catalog import Catalog
from ovserve.settings.loras import CompositeSettings, LoraSettings
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.request import ImageRequest
from tests.forms import FakeForm, catalog

FILE = Path(__file__)  # exists; the front end does not read it
MODEL = ModelSettings(
    name="m",
    lora=(
        LoraSettings(alias="a", path=FILE, alpha=0.8),
        LoraSettings(alias="b", path=FILE),
        LoraSettings(alias="styles/c.d", path=FILE),
    ),
    composite=(
        CompositeSettings(alias="ab", components=(("b", 0.25), ("a", 0.5))),
        CompositeSettings(alias="own", components=(("a", None),)),
    ),
    prompt_loras=True,
)


@pytest.fixture(scope="module")
def served() -> Catalog:
    return catalog(MODEL)


def parse(served: Catalog, *fields: tuple[str, Any], is_json: bool = False, path: str | None = None) -> Parameters:
    form = FakeForm([("prompt", "a star"), *fields], (), is_json=is_json)
    return parse_parameters(form, GENERATION, path, served, Settings())


@pytest.mark.parametrize(
    ("model", "alphas", "expected"),
    [
        ("m", None, ()),
        ("a", None, (("a", 0.8),)),
        ("b", None, (("b", 1.0),)),
        ("ab", None, (("a", 0.5), ("b", 0.25))),
        ("own", None, (("a", 0.8),)),
        ("a", {"a": -0.5}, (("a", -0.5),)),
        ("ab", {"b": 0}, (("a", 0.5), ("b", 0.0))),
        ("m", {"b": 2, "a": 1}, (("a", 1.0), ("b", 2.0))),
        ("m", {}, ()),
    ],
)
def test_weights_of_request_composite_and_adapter(
    served: Catalog, model: str, alphas: dict[str, float] | None, expected: tuple[Any, ...]
) -> None:
    fields = [("model", model)] + ([] if alphas is None else [("lora_alphas", alphas)])
    assert parse(served, *fields, is_json=True).request.adapters == expected
    if alphas is not None:
        text = [("model", model), ("lora_alphas", json.dumps(alphas))]
        assert parse(served, *text).request.adapters == expected
        keys = [("model", model), *((f"lora_alphas[{alias}]", str(weight)) for alias, weight in alphas.items())]
        assert parse(served, *keys).request.adapters == expected
    record = parse(served, *fields, is_json=True).request
    assert ImageRequest.from_json(record.to_json()).adapters == expected


def test_alias_with_dots_and_slashes_is_a_key(served: Catalog) -> None:
    assert parse(served, ("lora_alphas[styles/c.d]", "0.5"), ("model", "m")).request.adapters == (("styles/c.d", 0.5),)


def test_adapter_is_named_by_the_path_or_is_the_default_model() -> None:
    assert parse(catalog(MODEL, default="ab")).request.adapters == (("a", 0.5), ("b", 0.25))
    served = catalog(MODEL)
    assert parse(served, path="a").request.adapters == (("a", 0.8),)
    assert parse(served, ("model", "a"), path="a").request.adapters == (("a", 0.8),)
    with pytest.raises(InvalidValue, match="the path names 'm'"):
        parse(served, ("model", "a"), path="m")


def test_adapter_whose_workers_are_loading_is_not_ready(served: Catalog) -> None:
    coming = dataclasses.replace(served, aliases={**served.aliases, "new": "m"}, adapters=served.adapters | {"new"})
    with pytest.raises(NotReady, match="adapter 'new' of model 'm' is loading"):
        parse(coming, ("model", "new"))


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ([("model", "a"), ("lora_alphas", '{"b": 1}')], InvalidValue, ("'b'", "'a'")),
        ([("model", "m"), ("lora_alphas", '{"ghost": 1}')], InvalidValue, ("'ghost'", "a, b")),
        ([("lora_alphas", "{")], InvalidValue, ("valid JSON",)),
        ([("lora_alphas", "[" * 100_000)], InvalidValue, ("valid JSON",)),
        ([("lora_alphas", "[]")], InvalidType, ("an object",)),
        ([("lora_alphas", '{"a": "x"}')], InvalidType, ("a number",)),
        ([("lora_alphas", '{"a": true}')], InvalidType, ("a number",)),
        ([("lora_alphas", '{"a": 1e999}')], InvalidValue, ("finite",)),
        ([("lora_alphas", '{"a": 101}')], InvalidValue, ("-100 to 100",)),
        ([("lora_alphas[a]", "x")], InvalidValue, ("'x'",)),
        ([("lora_alphas[]", "1")], InvalidType, ("KEY",)),
        ([("lora_alphas[a][b]", "1")], InvalidType, ("KEY",)),
        ([("lora_alphas[a]", "1"), ("lora_alphas", '{"a": 2}')], InvalidValue, ("sent before",)),
    ],
)
def test_wrong_weights_name_the_field(
    served: Catalog, fields: list[tuple[str, str]], kind: type[ApiError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        parse(served, *fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith("lora_alphas")
    for word in (caught.value.param, *words):
        assert word in caught.value.message


def test_model_without_adapters_refuses_weights() -> None:
    for value in ("{}", '{"a": 1}'):
        with pytest.raises(UnsupportedParameter, match="lora_alphas needs LoRA adapters, which model 'm' does not"):
            parse(catalog(), ("lora_alphas", value))


@pytest.mark.parametrize(
    ("prompt", "left", "adapters"),
    [
        ("a star <lora:a:0.3>", "a star", (("a", 0.3),)),
        ("a <lora:a:0.3> star", "a star", (("a", 0.3),)),
        ("<lora:a><lora:b:-1>a star", "a star", (("a", 0.8), ("b", -1.0))),
        ("a star<lora:ab:2>", "a star", (("a", 1.0), ("b", 0.5))),
        ("a star<lora:styles/c.d:.5>", "a star", (("styles/c.d", 0.5),)),
        ("a  star <lora", "a  star <lora", ()),
        ("<lora:a:0.3>", "", (("a", 0.3),)),
    ],
)
def test_tags_in_the_prompt(served: Catalog, prompt: str, left: str, adapters: tuple[Any, ...]) -> None:
    request = parse(served, ("prompt", prompt)).request if prompt == "a star" else _with_prompt(served, prompt)
    assert (request.prompt, request.adapters) == (left, adapters)


def _with_prompt(served: Catalog, prompt: str, *fields: tuple[str, Any]) -> ImageRequest:
    form = FakeForm([("prompt", prompt), *fields], ())
    return parse_parameters(form, GENERATION, None, served, Settings()).request


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("<lora:ghost>", []),
        ("<lora:m>", []),
        ("<lora:>", []),
        ("<lora:a:x>", []),
        ("<lora:a:0.5:0.5>", []),
        ("<lora:a:1e2>", []),
        ("<lora:a:101>", []),
        ("<lora:a:nan>", []),
        ("<lora:a:1><lora:a:2>", []),
        ("<lora:a:1>", [("lora_alphas[a]", "2")]),
    ],
)
def test_wrong_tags_name_the_prompt(served: Catalog, prompt: str, fields: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidValue, match="prompt has") as caught:
        _with_prompt(served, f"a star {prompt}", *fields)
    assert caught.value.param == "prompt"


def test_tags_are_text_without_the_option() -> None:
    served = catalog(dataclasses.replace(MODEL, prompt_loras=False))
    request = _with_prompt(served, "a star <lora:a:0.3>")
    assert (request.prompt, request.adapters) == ("a star <lora:a:0.3>", ())


@given(
    prompt=st.lists(st.sampled_from(["<lora:", "a", "b", "ab", ":", "0.5", ">", "<", " ", "-", "x"]), max_size=12).map(
        "".join
    ),
    alphas=st.text(max_size=20)
    | st.dictionaries(st.sampled_from("abx"), st.floats() | st.none(), max_size=2).map(json.dumps),
)
def test_any_tags_and_weights_are_read_or_refused(prompt: str, alphas: str) -> None:
    try:
        request = _with_prompt(SERVED, "star " + prompt, ("lora_alphas", alphas))
    except ApiError as error:
        assert error.status == 400
        assert error.param in ("prompt", "lora_alphas")
        return
    assert all(-100 <= weight <= 100 for _, weight in request.adapters)
    assert {alias for alias, _ in request.adapters} <= {"a", "b"}


SERVED = catalog(MODEL)
