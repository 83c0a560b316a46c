"""The catalog of served models: name to profile and limits.

A reload changes each model's entry when its new workers take over, not before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ovserve.errors import MissingParameter, ModelNotFound, NotReady
from ovserve.models.pending import PendingModel
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import CATCH_ALL, ModelSettings, Settings

__all__ = ["Catalog", "ServedModel", "read_catalog"]

PENDING_RETRY_S = 30.0  # for a request for a model that is being pulled


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: its capabilities and the operator's limits."""

    profile: ModelProfile
    limits: ModelSettings

    @property
    def name(self) -> str:
        """The value of the request field `model`."""
        return self.profile.name

    @property
    def fixed_guidance_scale(self) -> float:
        """The only guidance scale of a request, where the option `resolution` is set."""
        fixed = self.limits.guidance_scale
        return self.profile.defaults.guidance_scale if fixed is None else fixed

    @property
    def cuts_prompt(self) -> bool:
        """Whether a prompt that is too long is cut, if the request does not choose: by the operator, else the model."""
        chosen = self.limits.truncate_prompt
        return self.profile.cuts_prompt if chosen is None else chosen == "cut"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every served model. Immutable: a change creates a new catalog."""

    models: Mapping[str, ServedModel]
    default: str  # empty: a request must name a model, unless there is only one
    # Further names (aliases, `*`, adapters, composites) to the models' names.
    aliases: Mapping[str, str] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()  # those of them that are adapters or composites
    created: int = field(default_factory=lambda: int(time.time()))
    pending: Mapping[str, PendingModel] = field(default_factory=dict)  # models that are being pulled, by name and alias

    @property
    def default_name(self) -> str:
        """Name of the model for requests that name none; empty: they must name one."""
        if self.default:
            return self.default if self.default in self.pending else self.name_of(self.default)
        if self.pending:  # as if they were there already
            names = {*self.models, *(model.name for model in self.pending.values())}
            return next(iter(names)) if len(names) == 1 else ""
        return next(iter(self.models)) if len(self.models) == 1 else ""

    def find(self, name: str | None) -> ServedModel:
        """Return the model with this name or alias; for None the default model, or the only one.

        Raises:
            ModelNotFound: no model has this name.
            MissingParameter: `name` is None, there are several models and no default.
            NotReady: the model is being pulled.
        """
        if name is None:
            name = self.default_name
        if not name:
            message = f"model is missing; choose one of: {_quoted(self.models)}."
            raise MissingParameter(message, param="model")
        if name in self.pending:
            message = f"The model {name!r} is not ready: {self.pending[name].reason}."
            raise NotReady(message, retry_after_s=PENDING_RETRY_S)
        found = self.models.get(self.name_of(name))
        if found is None:
            message = (
                f"The model {name[:200]!r} does not exist; available: {_quoted([*self.listed(), *self.pending])}. "
                "The server's option aliases adds further names."
            )
            raise ModelNotFound(message, param="model")
        return found

    def name_of(self, name: str) -> str:
        """Return the name of the model that a name or an alias stands for; empty for an unknown one."""
        return name if name in self.models else self.aliases.get(name) or self.aliases.get(CATCH_ALL, "")

    def listed(self) -> dict[str, ServedModel]:
        """Return the models by name, then by alias; without the catch-all."""
        aliases = {alias: self.models[name] for alias, name in self.aliases.items() if name in self.models}
        aliases.pop(CATCH_ALL, None)
        return {**self.models, **aliases}

    def announcing(self, new: Catalog) -> Catalog:
        """Return the catalog to serve while the workers of `new` are loading.

        The names, the aliases and the default of `new` apply at once. Models that are already served keep their current
        entries, so that requests are checked against the profile of the workers that will run them.
        """
        return replace(new, models={name: self.models.get(name, model) for name, model in new.models.items()})

    def with_serving(self, model: ServedModel) -> Catalog:
        """Return this catalog with one model as its workers serve it now; a removed model is not added again."""
        if model.name not in self.models:
            return self
        return replace(self, models={**self.models, model.name: model})


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def read_catalog(settings: Settings) -> Catalog:
    """Read the directory of every configured model. Raises ModelError and SettingsError."""
    models = [ServedModel(read_profile(model), model) for model in settings.models]
    aliases = {alias: model.name for model in settings.models for alias in model.further_names}
    adapters = frozenset(name for model in settings.models for name in model.adapter_names)
    return Catalog({model.name: model for model in models}, settings.default_model, aliases, adapters)
