"""The choice of a model's engine."""

from __future__ import annotations

from ovserve.models.classes import plan_engine
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings

__all__ = ["choose_engine"]


def choose_engine(profile: ModelProfile, settings: ModelSettings) -> tuple[str, str]:
    """Return the name of the engine for a model, and the reason for the log.

    Raises:
        ModelError: the configured engine cannot serve this model.
    """
    return plan_engine(profile.pipeline_class, settings.engine, settings.device, profile.directory)
