"""Checks of a configuration against the memory budget, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ovserve.errors import SettingsError
from ovserve.models.profile import ModelProfile
from ovserve.models.weights import estimated_bytes, weights_bytes
from ovserve.settings.options import Settings

__all__ = ["check_budget"]

_MIB = 1 << 20


def check_budget(settings: Settings, profiles: Mapping[str, ModelProfile]) -> list[str]:
    """Return what may not fit into the memory budget, one sentence each. Measuring decides.

    Raises:
        SettingsError: weight files alone exceed the budget: those of one model, or those of all models that are loaded
            at the start and never unloaded.
    """
    budget = settings.memory_budget_bytes
    if not budget:
        return []
    weights = {model.name: weights_bytes(profiles[model.name].directory) for model in settings.models}
    for name, size in weights.items():
        if size > budget:
            raise SettingsError(
                f"model {name}: its weight files take {_mib(size)}, more than memory_budget_bytes ({_mib(budget)})"
            )
    pinned = [model.name for model in settings.models if model.is_pinned and not model.is_lazy]
    total = sum(weights[name] for name in pinned)
    if total > budget:
        listed = " + ".join(f"{name} {_mib(weights[name])}" for name in pinned)
        raise SettingsError(
            f"the weight files of the models that are loaded at the start and pinned take {_mib(total)} ({listed}), "
            f"more than memory_budget_bytes ({_mib(budget)}); set load = lazy or pinned = false for some of them"
        )
    return list(_warnings(settings, profiles, budget))


def _warnings(settings: Settings, profiles: Mapping[str, ModelProfile], budget: int) -> Iterator[str]:
    for model in settings.models:
        expected = estimated_bytes(profiles[model.name].directory) * model.fewest_workers
        if expected > budget:
            yield (
                f"model {model.name} may take {_mib(expected)} by the size of its files, more than memory_budget_bytes "
                f"({_mib(budget)}); it is tried, and measuring decides"
            )


def _mib(count: int) -> str:
    return f"{-(-count // _MIB)} MiB"
