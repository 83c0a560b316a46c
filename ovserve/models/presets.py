"""The `quality` presets that a model declares, clamped to the operator's limits."""

from __future__ import annotations

from typing import Any

from ovserve.settings.options import ModelSettings

__all__ = ["PRESETS", "PRESET_KEYS", "limited_presets"]

PRESETS = ("low", "medium", "high")
PRESET_KEYS = ("num_inference_steps", "guidance_scale", "scheduler", "shortcuts")


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
