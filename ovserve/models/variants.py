"""Which variant of its family a model is, as its files say: distilled for a few steps, guided, or neither.

A distilled model and its teacher have the same class. Where one configuration value tells them apart, it is read here;
otherwise the name that the exporter recorded (`_name_or_path`) is searched for the word turbo. `ovserve.json` overrides
all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.models.families import EMBEDDED, FAMILIES, NO_GUIDANCE, Defaults

__all__ = ["ModelFiles", "Variant", "variant_of"]

Document = Mapping[str, Any]

_TURBO_SHIFT = 3.0  # of Z-Image-Turbo's scheduler; that of the undistilled Z-Image is larger


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The configuration files of a model that say which variant it is: model index, denoiser, scheduler."""

    index: Document
    denoiser: Document
    scheduler: Document


@dataclass(frozen=True, slots=True)
class Variant:
    """What a model's files say of it.

    Attributes:
        defaults: values for the request fields that a client leaves out.
        guidance: how the guidance scale acts: CLASSIFIER_FREE, EMBEDDED or NO_GUIDANCE.
        is_distilled: made for a few steps; half of them would give half a picture.
    """

    defaults: Defaults
    guidance: str
    is_distilled: bool


def variant_of(family: str, files: ModelFiles) -> Variant:
    """Return the variant of a model of a family of FAMILIES."""
    traits = FAMILIES[family]
    teacher = Variant(traits.defaults, traits.guidance, traits.is_distilled)
    return _RULES.get(family, _other)(teacher, files)


def _few_steps(variant: Variant, steps: int, guidance_scale: float) -> Variant:
    defaults = dataclasses.replace(variant.defaults, num_inference_steps=steps, guidance_scale=guidance_scale)
    return dataclasses.replace(variant, defaults=defaults, is_distilled=True)


def _is_called_turbo(files: ModelFiles) -> bool:
    return "turbo" in str(files.index.get("_name_or_path", "")).lower()


def _unet(variant: Variant, files: ModelFiles) -> Variant:
    """SD-Turbo and SDXL-Turbo: Euler ancestral with trailing timesteps; four steps, without guidance."""
    scheduler = str(files.scheduler.get("_class_name", ""))
    is_turbo = "EulerAncestral" in scheduler and files.scheduler.get("timestep_spacing") == "trailing"
    return _few_steps(variant, 4, 0.0) if is_turbo else variant


def _flux(variant: Variant, files: ModelFiles) -> Variant:
    """FLUX.1 schnell: the transformer has no input for the guidance scale."""
    if files.denoiser.get("guidance_embeds") is not False:
        return variant
    return dataclasses.replace(_few_steps(variant, 4, 0.0), guidance=NO_GUIDANCE)


def _klein(variant: Variant, files: ModelFiles) -> Variant:
    """FLUX.2 klein: the model index says whether it is distilled."""
    if files.denoiser.get("guidance_embeds"):
        variant = dataclasses.replace(variant, guidance=EMBEDDED)
    if not files.index.get("is_distilled"):
        return variant
    return dataclasses.replace(_few_steps(variant, 4, 1.0), guidance=NO_GUIDANCE)


def _z_image(variant: Variant, files: ModelFiles) -> Variant:
    shift = files.scheduler.get("shift", _TURBO_SHIFT)
    is_turbo = _is_called_turbo(files) or (isinstance(shift, int | float) and shift <= _TURBO_SHIFT)
    return _few_steps(variant, 9, 0.0) if is_turbo else variant


def _other(variant: Variant, files: ModelFiles) -> Variant:
    """Other families: SD3.5 Large Turbo differs from SD3.5 Large in its name alone."""
    is_turbo = _is_called_turbo(files) and not variant.is_distilled
    return _few_steps(variant, 4, 0.0) if is_turbo else variant


_RULES: Mapping[str, Callable[[Variant, ModelFiles], Variant]] = {
    "stable-diffusion": _unet,
    "sdxl": _unet,
    "flux": _flux,
    "flux2-klein": _klein,
    "z-image": _z_image,
}
