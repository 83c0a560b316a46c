"""The catalog across reloads."""

from __future__ import annotations

import pytest

from ovserve.errors import ModelNotFound
from ovserve.models.catalog import ServedModel
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings
from tests.forms import catalog


def named(name: str, max_num_inference_steps: int) -> ModelSettings:
    return ModelSettings(name=name, max_num_inference_steps=max_num_inference_steps)


def served(model: ModelSettings) -> ServedModel:
    return ServedModel(read_profile(model), model)


def test_reload_changes_names_at_once_and_keeps_entries_of_served_models() -> None:
    now = catalog(named("a", 50), named("b", 50), default="b")
    new = catalog(named("c", 60), named("a", 60), default="c")
    coming = now.announcing(new)
    assert list(coming.models) == ["c", "a"]
    assert (coming.default, coming.created) == ("c", new.created)
    assert {name: model.limits.max_num_inference_steps for name, model in coming.models.items()} == {"c": 60, "a": 50}


def test_with_serving_replaces_the_entry_of_one_model() -> None:
    now = catalog(named("a", 50), named("b", 50))
    then = now.with_serving(served(named("b", 60)))
    assert {name: model.limits.max_num_inference_steps for name, model in then.models.items()} == {"a": 50, "b": 60}
    assert then.created == now.created


def test_with_serving_does_not_add_a_removed_model_again() -> None:
    now = catalog(named("a", 50))
    assert now.with_serving(served(named("gone", 60))) is now


def aliased(name: str, *aliases: str, builtin: bool = False) -> ModelSettings:
    return ModelSettings(name=name, aliases=aliases, builtin_aliases=builtin)


def test_alias_finds_its_model_and_is_listed() -> None:
    now = catalog(aliased("a", "x", "y"), aliased("b"))
    assert now.find("x") is now.find("y") is now.find("a")
    assert {name: model.name for name, model in now.listed().items()} == {"a": "a", "b": "b", "x": "a", "y": "a"}


def test_catch_all_is_not_listed_and_loses_against_exact_names() -> None:
    now = catalog(aliased("a", "*"), aliased("b", "x"))
    assert [now.find(name).name for name in ("anything", "x", "b", "a")] == ["a", "b", "b", "a"]
    assert list(now.listed()) == ["a", "b", "x"]


def test_builtin_aliases_are_added_without_the_own_name() -> None:
    now = catalog(aliased("gpt-image-1", builtin=True))
    assert now.find("dall-e-2").name == now.find("default").name == "gpt-image-1"
    assert list(now.listed()) == [
        "gpt-image-1",
        "gpt-image-1-mini",
        "gpt-image-1.5",
        "gpt-image-2",
        "dall-e-2",
        "dall-e-3",
        "default",
    ]


def test_unknown_name_is_an_error_that_lists_aliases_and_names_the_option() -> None:
    with pytest.raises(ModelNotFound) as found:
        catalog(aliased("a", "x")).find("gpt-image-1")
    assert str(found.value) == (
        "The model 'gpt-image-1' does not exist; available: 'a', 'x'. The server's option aliases adds further names."
    )


def test_reload_changes_aliases_at_once() -> None:
    coming = catalog(aliased("a", "x")).announcing(catalog(aliased("a", "y")))
    assert list(coming.listed()) == ["a", "y"]
