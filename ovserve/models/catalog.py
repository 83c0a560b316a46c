"""The models that are served: name to profile and limits. A reload changes each when its new workers take over, not before."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ovserve.errors import MissingParameter, ModelNotFound
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Settings

__all__ = ["Catalog", "ServedModel", "read_catalog"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: what it can do and what the operator allows."""

    profile: ModelProfile
    limits: ModelSettings

    @property
    def name(self) -> str:
        """What clients put into `model`."""
        return self.profile.name


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every served model. Immutable: what changes makes a new one."""

    models: Mapping[str, ServedModel]
    default: str  # empty: a request must name one, unless there is only one
    created: int = field(default_factory=lambda: int(time.time()))

    def find(self, name: str | None) -> ServedModel:
        """The model of that name; for None the default, or the only one. Raises ModelNotFound and MissingParameter."""
        if name is None:
            name = self.default or (next(iter(self.models)) if len(self.models) == 1 else None)
        if name is None:
            told = f"Missing required parameter: 'model', for several are served: {_listed(self.models)}."
            raise MissingParameter(told, param="model")
        found = self.models.get(name)
        if found is None:
            told = f"The model '{name[:200]}' does not exist. Served: {_listed(self.models)}."
            raise ModelNotFound(told, param="model")
        return found

    def announcing(self, new: Catalog) -> Catalog:
        """The catalogue while the workers of `new` are on their way.

        Its names, and the default among them, hold at once. Models that are served already stay as they are: requests are
        checked by what the workers know that will run them.
        """
        return replace(new, models={name: self.models.get(name, model) for name, model in new.models.items()})

    def with_serving(self, model: ServedModel) -> Catalog:
        """The same with one model as its workers serve it now. One that is not in the catalogue any more does not come back."""
        if model.name not in self.models:
            return self
        return replace(self, models={**self.models, model.name: model})


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def read_catalog(settings: Settings) -> Catalog:
    """Read every model's directory. Raises ModelError and SettingsError."""
    models = [ServedModel(read_profile(model), model) for model in settings.models]
    return Catalog({model.name: model for model in models}, settings.default_model)
