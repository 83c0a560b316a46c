"""The LoRA adapters of a request and their weights: from `model`, `lora_alphas`, and the prompt where that is allowed.

A weight of the request takes precedence over a composite's, that over the adapter's own, and that over 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ovserve.api.parameters.validate import Given
from ovserve.api.parameters.values import shown
from ovserve.errors import InvalidValue, NotReady, UnsupportedParameter
from ovserve.models.catalog import Catalog, ServedModel
from ovserve.settings.loras import MAX_ALPHA

__all__ = ["check_is_loaded", "check_same_adapters", "choose_adapters"]

_TAG = re.compile(r"<lora:([^<>:]*)(?::([^<>]*))?>")
_WEIGHT = re.compile(r"[+-]?(?:[0-9]{1,10}\.?[0-9]{0,20}|\.[0-9]{1,20})")
_BLANKS = re.compile(r"[ \t]{2,}")

Weights = dict[str, float]


def check_same_adapters(catalog: Catalog, named: str, path_model: str) -> None:
    """Check that the field `model` and the path do not name different adapters of one model. Raises InvalidValue."""
    model = catalog.find(named)
    if model.limits.adapters_of(named) != model.limits.adapters_of(path_model):
        raise InvalidValue(
            f"model is {named[:200]!r}, but the path names {path_model[:200]!r}; send one of them.", param="model"
        )


def check_is_loaded(catalog: Catalog, requested: str, model: ServedModel) -> None:
    """Check that the workers which serve a model have the requested adapter or composite.

    A reload adds the name at once, and the adapter when the new workers take over.

    Raises:
        NotReady: they are still loading.
    """
    if requested in catalog.adapters and requested not in model.limits.adapter_names:
        raise NotReady(f"The adapter {requested[:200]!r} of model {model.name!r} is loading.", retry_after_s=2)


def choose_adapters(given: Given, requested: str, model: ServedModel) -> tuple[tuple[str, float], ...]:
    """Return alias and weight of each adapter of a request, in the model's order; take their tags out of the prompt.

    Args:
        given: the values of the request; the prompt is replaced if it has tags.
        requested: the name that the request uses for the model.
        model: the model.

    Raises:
        UnsupportedParameter: the request gives weights, and the model has no adapters.
        InvalidValue: a weight for an adapter that the requested name does not have, or two different weights for one.
    """
    limits = model.limits
    own = limits.adapters_of(requested)
    from_field = _weights_of_field(given, requested, own, model)
    from_prompt = _weights_of_prompt(given, model) if limits.prompt_loras else {}
    for alias, weight in from_prompt.items():
        if from_field.get(alias, weight) != weight:
            raise InvalidValue(
                f"prompt has weight {weight:g} for {alias!r}, but {given.spelled('lora_alphas')} has "
                f"{from_field[alias]:g}; send one of them.",
                param="prompt",
            )
    found = {**own, **from_prompt, **from_field}
    return tuple((adapter.alias, found[adapter.alias]) for adapter in limits.lora if adapter.alias in found)


def _weights_of_field(given: Given, requested: str, own: Weights, model: ServedModel) -> Weights:
    """Return the weights in `lora_alphas`, after checking that they belong to the requested adapters."""
    weights: Weights | None = given.values.get("lora_alphas")
    if weights is None:
        return {}
    spelled = given.spelled("lora_alphas")
    every = [adapter.alias for adapter in model.limits.lora]
    if not every:
        raise UnsupportedParameter(
            f"{spelled} needs LoRA adapters, which model {model.name!r} does not have; remove it.", param=spelled
        )
    for alias in weights:
        if alias not in (own or every):
            whose = f"model {requested[:200]!r} has" if own else f"model {model.name!r} has the adapters"
            raise InvalidValue(f"{spelled} names {shown(alias)}, but {whose} {', '.join(own or every)}.", param=spelled)
    return weights


def _weights_of_prompt(given: Given, model: ServedModel) -> Weights:
    """Return the weights in the prompt's tags, and remove these from the prompt."""
    prompt: str = given.values.get("prompt", "")
    weights: Weights = {}
    for tag in _TAG.finditer(prompt):
        for alias, weight in _weights_of_tag(tag[0], tag[1], tag[2], model).items():
            if weights.get(alias, weight) != weight:
                raise InvalidValue(f"prompt has two weights for {alias!r}; send one of them.", param="prompt")
            weights[alias] = weight
    if weights:
        given.values["prompt"] = _BLANKS.sub(" ", _TAG.sub("", prompt)).strip()
    return weights


def _weights_of_tag(tag: str, name: str, text: str | None, model: ServedModel) -> Mapping[str, float]:
    """Return the adapters of one tag; the weight of a composite multiplies those of its components."""
    adapters = model.limits.adapters_of(name)
    if not adapters:
        known = ", ".join(model.limits.adapter_names) or "none"
        raise InvalidValue(
            f"prompt has {shown(tag)}, but model {model.name!r} has no such adapter; it has: {known}.", param="prompt"
        )
    if text is None:
        return adapters
    if not _WEIGHT.fullmatch(text) or abs(float(text)) > MAX_ALPHA:
        raise InvalidValue(
            f"prompt has {shown(tag)}; expected a number from {-MAX_ALPHA:g} to {MAX_ALPHA:g} as the weight.",
            param="prompt",
        )
    weight = float(text)
    is_adapter = any(adapter.alias == name for adapter in model.limits.lora)
    return {name: weight} if is_adapter else {alias: weight * own for alias, own in adapters.items()}
