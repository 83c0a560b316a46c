"""Which models readiness waits for, by the option `ready_models`: for health checks, and for READY at the start."""

from __future__ import annotations

from collections.abc import Mapping

from ovserve.dispatch.model_queue import ModelStatus
from ovserve.models.catalog import Catalog
from ovserve.settings.options import Settings

__all__ = ["awaited_models", "is_ready"]


def is_ready(settings: Settings, catalog: Catalog, statuses: Mapping[str, ModelStatus]) -> bool:
    """Return whether the models that `ready_models` selects are ready."""
    names, is_one_enough = _selected(settings, catalog, statuses)
    ready = [name in statuses and statuses[name].ready for name in names]
    return any(ready) if is_one_enough else all(ready)


def awaited_models(settings: Settings, catalog: Catalog, statuses: Mapping[str, ModelStatus]) -> list[str]:
    """Return the models that the start of the server still waits for.

    A model that has failed is not waited for: it is tried again only after minutes, and the others can serve. Nor is
    one that is not ready for another reason than its workers, such as a full spool disk.
    """
    names, is_one_enough = _selected(settings, catalog, statuses)
    started = [name for name in names if name in statuses and (statuses[name].ready or statuses[name].workers)]
    if is_one_enough and started:
        return []
    failed = {name for name, status in statuses.items() if status.failed}
    failed |= {model.name for model in catalog.pending.values() if model.state.has_failed}
    return [name for name in names if name not in started and name not in failed]


def _selected(settings: Settings, catalog: Catalog, statuses: Mapping[str, ModelStatus]) -> tuple[list[str], bool]:
    """Return the names of the models that readiness depends on, and whether one of them is enough."""
    which = settings.ready_models
    if which == "default" and catalog.default_name:
        return [catalog.default_name], False
    pending = {model.name for model in catalog.pending.values()}  # they are being pulled
    return [*statuses, *sorted(pending)], which != "all"
