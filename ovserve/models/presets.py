"""The `quality` presets of a model: those it declares, clamped to the operator's limits, else the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.models.families import Defaults
from ovserve.settings.options import ModelSettings

__all__ = ["PRESETS", "PRESET_KEYS", "Preset", "limited_presets", "resolve_preset"]

PRESETS = ("low", "medium", "high")
PRESET_KEYS = ("num_inference_steps", "guidance_scale", "scheduler", "shortcuts")

# For a model that declares no presets: the share of its default steps, and the rest of the preset. The values come from
# measured differences to the exact pictures and measured times (docs/performance.md). An engine without such a
# scheduler or shortcut ignores it.
_STEP_SHARES = {"low": 0.3, "medium": 0.5, "high": 1.0}
_BUILT_IN: dict[str, dict[str, Any]] = {
    "low": {"scheduler": "dpmpp_2m", "shortcuts": "guidance_until=0.6"},
    "medium": {"scheduler": "dpmpp_2m"},
    "high": {},
}
# With the engine `stepwise`, and at least this number of default steps: all steps, some of them forecast. That costs as
# much as the share above and is nearer to the exact picture.
_FORECASTS: dict[str, tuple[int, str]] = {
    "medium": (20, "denoise_every=2"),
    "low": (30, "denoise_every=4,guidance_until=0.6"),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """The values of one preset for one model.

    Attributes:
        num_inference_steps, guidance_scale: defaults of these request fields.
        scheduler: used if the request names none and the engine has it; empty for the model's own.
        shortcuts: engine shortcuts; empty for exact computation.
    """

    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    shortcuts: str


def resolve_preset(
    name: str,
    declared: Mapping[str, Mapping[str, Any]],
    defaults: Defaults,
    *,
    is_distilled: bool,
    can_forecast: bool,
) -> Preset:
    """Return a preset: the declared one, else the built-in one, completed with the model's defaults.

    Args:
        name: low, medium or high.
        declared: the presets that the model declares.
        defaults: the model's defaults.
        is_distilled: the model was made for its few default steps: the built-in presets keep them, and its scheduler.
        can_forecast: the engine has the shortcut `denoise_every`.
    """
    steps = defaults.num_inference_steps
    share = steps if is_distilled else max(min(2, steps), round(steps * _STEP_SHARES[name]))
    preset = declared.get(name)
    if preset is None:
        preset = _BUILT_IN["high" if is_distilled else name]
        fewest, shortcuts = _FORECASTS.get(name, (0, ""))
        if can_forecast and shortcuts and steps >= fewest and not is_distilled:
            preset, share = {"shortcuts": shortcuts}, steps
    return Preset(
        num_inference_steps=int(preset.get("num_inference_steps", share)),
        guidance_scale=float(preset.get("guidance_scale", defaults.guidance_scale)),
        scheduler=str(preset.get("scheduler", "")),
        shortcuts=str(preset.get("shortcuts", "")),
    )


def limited_presets(declared: dict[str, dict[str, Any]], settings: ModelSettings) -> dict[str, dict[str, Any]]:
    """Return the directory's presets, clamped to the operator's limits.

    A default that the operator sets replaces the same field of the preset `high`.

    Raises:
        ValueError: a preset contains an unknown field.
    """
    presets = {}
    for name, fields in declared.items():
        if unknown := sorted(fields.keys() - PRESET_KEYS):
            raise ValueError(f"ovserve.json: presets.{name}: {unknown[0]!r} is not one of {', '.join(PRESET_KEYS)}")
        preset = dict(fields)
        if name == "high" and settings.default_num_inference_steps is not None:
            preset.pop("num_inference_steps", None)
        if name == "high" and settings.default_guidance_scale is not None:
            preset.pop("guidance_scale", None)
        for field_name, limit in (
            ("num_inference_steps", settings.max_num_inference_steps),
            ("guidance_scale", settings.max_guidance_scale),
        ):
            if field_name in preset:
                preset[field_name] = min(preset[field_name], limit)
        presets[name] = preset
    return presets
