from __future__ import annotations

from ovserve.models.catalog import ServedModel
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings
from tests.forms import catalog


def named(name: str, max_num_inference_steps: int) -> ModelSettings:
    return ModelSettings(name=name, max_num_inference_steps=max_num_inference_steps)


def served(model: ModelSettings) -> ServedModel:
    return ServedModel(read_profile(model), model)


def test_reload_brings_names_at_once_and_leaves_models_that_are_served_as_they_are() -> None:
    now = catalog(named("a", 50), named("b", 50), default="b")
    new = catalog(named("c", 60), named("a", 60), default="c")
    coming = now.announcing(new)
    assert list(coming.models) == ["c", "a"]
    assert (coming.default, coming.created) == ("c", new.created)
    assert {name: model.limits.max_num_inference_steps for name, model in coming.models.items()} == {"c": 60, "a": 50}


def test_model_changes_when_its_new_workers_serve_and_only_that_one() -> None:
    now = catalog(named("a", 50), named("b", 50))
    then = now.with_serving(served(named("b", 60)))
    assert {name: model.limits.max_num_inference_steps for name, model in then.models.items()} == {"a": 50, "b": 60}
    assert then.created == now.created


def test_model_that_was_removed_does_not_come_back_with_its_late_workers() -> None:
    now = catalog(named("a", 50))
    assert now.with_serving(served(named("gone", 60))) is now
