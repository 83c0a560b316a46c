"""The catalog across reloads."""

from __future__ import annotations

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
