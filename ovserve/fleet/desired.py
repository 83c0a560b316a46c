"""The desired state: which models should have workers, how many, and what makes new workers necessary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.models.fingerprint import fingerprint
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings

__all__ = ["FRONT_END_OPTIONS", "DesiredModel", "desired_models"]

# Options of a model that no worker reads: a change of one of them takes effect without new workers. The profile, which
# is compared as well, has what the others make of a model's defaults.
FRONT_END_OPTIONS = (
    "replicas", "min_replicas", "max_replicas", "load", "keep_alive_s", "pinned", "priority",
    "queue_limit", "memory_limit_bytes", "max_jobs_per_worker",
    "default_resolution", "max_num_images_per_prompt",
    "default_num_inference_steps", "max_num_inference_steps", "default_guidance_scale", "max_guidance_scale",
    "default_strength", "min_strength", "max_strength", "aliases", "builtin_aliases",
    "num_images_per_prompt", "graph_options",
    "extra_images", "truncate_prompt", "default_response_format", "unknown_fields", "composite", "source_loras",
    "prompt_loras",
)  # fmt: skip
_DEFAULTS = ModelSettings()


@dataclass(frozen=True, slots=True)
class DesiredModel:
    """What should run for one model.

    Attributes:
        profile: what the model's directory declares.
        model: its options.
        settings: the server's options; the supervisor applies its timeouts and limits.
        files: fingerprint of the model's files.
        workers: how many it should have now; 0: it is not resident. The residency policy decides.
    """

    profile: ModelProfile
    model: ModelSettings
    settings: Settings
    files: str = ""
    workers: int = 0

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model.name

    @property
    def model_of_workers(self) -> ModelSettings:
        """The model's options with the defaults of those that no worker reads."""
        unread = {name: getattr(_DEFAULTS, name) for name in FRONT_END_OPTIONS}
        # The weights of adapters travel with each request.
        adapters = tuple(dataclasses.replace(adapter, alpha=1.0) for adapter in self.model.lora)
        return dataclasses.replace(self.model, **unread, lora=adapters)

    @property
    def worker_key(self) -> tuple[Any, ...]:
        """What workers are started with: records with equal keys can keep each other's workers."""
        # The level of the log is changed in a running worker.
        settings = dataclasses.replace(WorkerSettings.of(self.settings), log_level="")
        return self.profile, self.model_of_workers, settings, self.files


def desired_models(settings: Settings, profiles: Mapping[str, ModelProfile]) -> dict[str, DesiredModel]:
    """Return the desired state of a configuration, by model name; no model has workers yet."""
    return {
        model.name: DesiredModel(
            profiles[model.name],
            _planned(model, profiles[model.name]),
            settings,
            fingerprint(profiles[model.name].directory, model.cache_dir, [adapter.path for adapter in model.lora]),
        )
        for model in settings.models
    }


def _planned(model: ModelSettings, profile: ModelProfile) -> ModelSettings:
    """Return the options with the stored plan: here, so that estimates of memory see it as well as workers."""
    return model if profile.plan is None else profile.plan.apply(model)
