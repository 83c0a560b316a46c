"""The choice of a model's engine."""

from __future__ import annotations

from ovserve.engines.families.lookup import DRIVEN_FAMILIES, check_driven
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings

__all__ = ["choose_engine"]


def choose_engine(profile: ModelProfile, settings: ModelSettings) -> tuple[str, str]:
    """Return the name of the engine for a model, and the reason for the log.

    Raises:
        ModelError: the configured engine cannot serve this model.
    """
    if settings.engine == "stepwise":
        check_driven(profile)
        return "stepwise", "configured"
    if settings.engine == "genai":
        return "genai", "configured"
    if profile.family not in DRIVEN_FAMILIES:
        return "genai", f"stepwise does not serve family {profile.family}"
    if "NPU" in settings.device:
        return "genai", "an NPU requires static shapes"
    return "stepwise", "same bits as genai for this family, and pictures share its calls"
