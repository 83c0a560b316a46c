"""What a model can do: family, sizes, defaults, limits; data that the front end and the worker both read.

Read from the directory's own JSON files, without OpenVINO, so that the front end knows a model in a millisecond and a wrong
directory is refused before any process is started. A file `ovserve.json` beside `model_index.json` may declare what those
files cannot say: the sizes a model was trained for, its best defaults, its presets.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ovserve.errors import ModelError, SettingsError
from ovserve.models.families import T5_ENCODERS, Defaults, family_of
from ovserve.models.presets import PRESETS, limited_presets
from ovserve.settings.options import BUILTIN_PREFIX, ModelSettings, Resolution

__all__ = [
    "ModelProfile",
    "Scheduling",
    "builtin_directory",
    "read_profile",
]


@dataclass(frozen=True, slots=True)
class Scheduling:
    """The scheduler a model's directory names, and what of its configuration bounds a request."""

    name: str  # DDIM, PNDM, EulerDiscrete, EulerAncestralDiscrete, LCM, FlowMatchEulerDiscrete
    num_train_timesteps: int
    timestep_spacing: str  # leading, trailing, linspace
    original_inference_steps: int  # LCM only


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One model as the rest of the program needs to know it. Immutable; plain data.

    Attributes:
        name: what clients put into `model`.
        directory: where it lies.
        family: stable-diffusion, lcm, sdxl, sd3, flux.
        tasks: which of text2image, image2image, inpainting it serves.
        inpainting_unet: the UNet takes mask and masked image as further channels (9 in all).
        side_multiple_px: both working sides are multiples of this.
        native: working size when nothing else decides, in pixels.
        min_side_px, max_side_px: the sides it was made to work at.
        prompt_tokens: the window of the text encoder that reads most of the prompt, special tokens included.
        text_encoders: how many prompts it reads (prompt_2, prompt_3).
        takes_negative_prompt: whether a negative prompt has any effect (classifier-free guidance).
        presets: `quality` name to the fields it sets.
    """

    name: str
    directory: Path
    family: str
    tasks: frozenset[str]
    inpainting_unet: bool
    side_multiple_px: int
    native: Resolution
    min_side_px: int
    max_side_px: int
    prompt_tokens: int
    text_encoders: int
    takes_negative_prompt: bool
    scheduling: Scheduling
    defaults: Defaults
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def working_size(self, width: int, height: int) -> Resolution:
        """The size at which a picture of `width` x `height` is worked on.

        The nearest size in the native range with the same shape, as far as side_multiple_px and the range allow: it is never
        smaller in shape than asked for, so fitting back only crops and scales.
        """
        step, low, high = self.side_multiple_px, self.min_side_px, self.max_side_px
        scale = 1.0
        if max(width, height) > high:
            scale = high / max(width, height)
        elif min(width, height) < low:
            scale = min(low / min(width, height), high / max(width, height))
        sides = (math.ceil(round(side * scale, 6) / step) * step for side in (width, height))
        return Resolution(*(min(high, max(low, side)) for side in sides))


BUILTIN_MODELS = {"shapes": "builtin"}  # name to folder in the package
SIZE_KEYS = ("native", "min_side_px", "max_side_px", "side_multiple_px")
INPAINTING_CHANNELS = 9  # latents, mask, and the masked image's latents
_FLOW_MATCHING = Scheduling("FlowMatchEulerDiscrete", 1000, "linspace", 50)


def builtin_directory(name: str = "shapes") -> Path:
    """Return the directory of a built-in model inside the installed package. Raises ModelError for an unknown name."""
    if name not in BUILTIN_MODELS:
        known = ", ".join(f"{BUILTIN_PREFIX}{known}" for known in BUILTIN_MODELS)
        raise ModelError(f"{BUILTIN_PREFIX}{name}: not one of the built-in models: {known}")
    return Path(str(files("ovserve") / BUILTIN_MODELS[name]))


def _model_directory(path: Path | None) -> Path:
    """Return the directory that the option `path` means. Raises ModelError for an unknown built-in model."""
    if path is None:
        return builtin_directory()
    text = str(path)
    return builtin_directory(text.removeprefix(BUILTIN_PREFIX)) if text.startswith(BUILTIN_PREFIX) else path


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: {what} is missing ({path.name})") from None
    except (OSError, ValueError) as error:  # not there, no UTF-8, no JSON, a number of thousands of digits
        raise ModelError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise ModelError(f"{path}: cannot be read: nested too deeply") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return document


def _check_component(directory: Path, name: str, stem: str = "openvino_model") -> Path:
    part = directory / name
    if not part.is_dir():
        raise ModelError(f"{directory}: component {name!r} is missing")
    for suffix in (".xml", ".bin"):
        if not (part / (stem + suffix)).is_file():
            raise ModelError(f"{directory}: component {name!r} has no {stem}{suffix}")
    return part


def _number(document: dict[str, Any], key: str, default: float) -> float:
    value = document.get(key, default)
    return default if value is None or isinstance(value, bool) or not isinstance(value, int | float) else value


def _scheduling(directory: Path, index: dict[str, Any]) -> Scheduling:
    config = _read_json(directory / "scheduler" / "scheduler_config.json", "the scheduler configuration")
    declared = index.get("scheduler")
    name = str(config.get("_class_name") or (declared[1] if isinstance(declared, list) and len(declared) > 1 else ""))
    return Scheduling(
        name=name.removesuffix("Scheduler") or "PNDM",
        num_train_timesteps=int(_number(config, "num_train_timesteps", 1000)),
        timestep_spacing=str(config.get("timestep_spacing") or "leading"),
        original_inference_steps=int(_number(config, "original_inference_steps", 50)),
    )


def read_profile(settings: ModelSettings) -> ModelProfile:
    """Read a model's directory, and lay the operator's own defaults over what it declares.

    Raises:
        ModelError: no built-in model has this name, or the directory is missing, is no image pipeline, or lacks a component;
            the message names it.
        SettingsError: a default lies outside the operator's own limits.
    """
    given = _model_directory(settings.path)
    try:
        directory = Path(os.path.realpath(given))  # unlike Path.resolve, it takes a loop of links: no directory, then
        profile = _read_directory(directory, settings)
    except OSError as error:
        raise ModelError(f"{given}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a JSON value other than its name promises
        raise ModelError(f"{given}: a configuration file holds a wrong value: {error}") from None
    _check_defaults(profile, settings)
    return profile


def _read_directory(directory: Path, settings: ModelSettings) -> ModelProfile:
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory")
    index = _read_json(directory / "model_index.json", "the model index")
    family, defaults = family_of(str(index.get("_class_name", "")), directory)
    is_transformer = (directory / "transformer").is_dir()
    denoiser = _component_config(directory, "transformer" if is_transformer else "unet", "the denoiser's configuration")
    vae = _component_config(directory, "vae_decoder", "the VAE's configuration")
    text = _component_config(directory, "text_encoder", "the text encoder's configuration")
    _check_component(directory, "tokenizer", "openvino_tokenizer")
    inpainting_unet = not is_transformer and int(_number(denoiser, "in_channels", 4)) == INPAINTING_CHANNELS
    declared = _read_json(directory / "ovserve.json", "") if (directory / "ovserve.json").is_file() else {}

    blocks = vae.get("block_out_channels")
    vae_scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else 8
    side = int(_number(denoiser, "sample_size", 128 if is_transformer else 64)) * vae_scale
    _check_declared(declared)
    sizes = declared.get("sizes", {})
    # Transformers take latents in patches of two; some exports of UNets want coarser sizes, and say so in ovserve.json.
    multiple = int(_number(sizes, "side_multiple_px", vae_scale * (2 if is_transformer else 1)))
    return ModelProfile(
        name=settings.name,
        directory=directory,
        family=family,
        tasks=_tasks(directory, inpainting_unet=inpainting_unet),
        inpainting_unet=inpainting_unet,
        side_multiple_px=multiple,
        native=Resolution.parse(sizes["native"]) if "native" in sizes else Resolution(side, side),
        min_side_px=int(_number(sizes, "min_side_px", max(multiple, side // 2))),
        max_side_px=int(_number(sizes, "max_side_px", max(side * 2, multiple))),
        prompt_tokens=_prompt_tokens(directory, family, text),
        text_encoders=sum((directory / part).is_dir() for part in ("text_encoder", "text_encoder_2", "text_encoder_3")),
        takes_negative_prompt=family in ("stable-diffusion", "sdxl", "sd3"),
        scheduling=_FLOW_MATCHING if is_transformer else _scheduling(directory, index),
        defaults=_defaults(defaults, declared.get("defaults", {}), settings),
        presets=limited_presets(declared.get("presets", {}), settings),
    )


def _check_declared(declared: dict[str, Any]) -> None:
    """Raise ValueError for a name in ovserve.json that nothing reads: a mistyped default would be passed over in silence."""
    known = {"defaults": tuple(f.name for f in dataclasses.fields(Defaults)), "sizes": SIZE_KEYS, "presets": PRESETS}
    for section, names in (("", tuple(known)), *known.items()):
        for name in declared.get(section, {}) if section else declared:
            if name not in names:
                where = f"ovserve.json: {section}: " if section else "ovserve.json: "
                raise ValueError(f"{where}{name!r} is none of {', '.join(names)}")
    for name, value in declared.get("sizes", {}).items():
        if name != "native" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"ovserve.json: sizes: {name}: expected a number of pixels, but got {value!r}")


def _component_config(directory: Path, name: str, what: str) -> dict[str, Any]:
    return _read_json(_check_component(directory, name) / "config.json", what)


def _tasks(directory: Path, *, inpainting_unet: bool) -> frozenset[str]:
    """What the components can do together. Raises ModelError for a VAE encoder without its weights."""
    has_encoder = (directory / "vae_encoder").is_dir()
    if has_encoder:
        _check_component(directory, "vae_encoder")
    if inpainting_unet:
        return frozenset(("inpainting",))
    return frozenset(("text2image", "image2image", "inpainting") if has_encoder else ("text2image",))


def _prompt_tokens(directory: Path, family: str, text: dict[str, Any]) -> int:
    """The window of the encoder that reads the whole prompt: T5 where the family and the directory have one."""
    t5_encoder, t5_tokens = T5_ENCODERS.get(family, ("", 0))
    if t5_encoder and (directory / t5_encoder).is_dir():
        return t5_tokens
    return int(_number(text, "max_position_embeddings", 77))


def _defaults(known: Defaults, declared: dict[str, Any], settings: ModelSettings) -> Defaults:
    """The operator's, else the directory's own, else the family's."""

    def chosen(operator: float | None, name: str) -> float:
        return operator if operator is not None else float(_number(declared, name, getattr(known, name)))

    def within(strength: float) -> float:  # the operator sets no default for these, only the limits
        return min(max(strength, settings.min_strength), settings.max_strength)

    return Defaults(
        num_inference_steps=int(chosen(settings.default_num_inference_steps, "num_inference_steps")),
        guidance_scale=chosen(settings.default_guidance_scale, "guidance_scale"),
        strength=chosen(settings.default_strength, "strength"),
        strength_inpainting=within(chosen(None, "strength_inpainting")),
        strength_variation=within(chosen(None, "strength_variation")),
    )


def _check_defaults(profile: ModelProfile, settings: ModelSettings) -> None:
    """Raise SettingsError when a request without any option would break the operator's own limits."""
    defaults = profile.defaults
    checks = (
        ("num_inference_steps", defaults.num_inference_steps, 1, settings.max_num_inference_steps),
        ("guidance_scale", defaults.guidance_scale, 0, settings.max_guidance_scale),
        ("strength", defaults.strength, settings.min_strength, settings.max_strength),
    )
    for name, value, low, high in checks:
        if not low <= value <= high:
            raise SettingsError(
                f"model {profile.name}: the default {name} {value:g} is outside the limits {low:g}..{high:g}"
            )
