"""The profile of a model: family, tasks, sizes, defaults, limits. Used by the front end and by the workers.

It is read from the JSON files in the model's directory, without OpenVINO: this takes about a millisecond, and a wrong
directory is reported before a process is started. An optional file `ovserve.json` beside `model_index.json` declares
what those files do not contain: the sizes the model was trained for, its best defaults, its presets.
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

from ovserve.errors import ModelError, SettingsError, may_pass
from ovserve.models.classes import CLASSES, class_named, plan_engine
from ovserve.models.families import CLASSIFIER_FREE, FAMILIES, LCM_SCHEDULER, Defaults, FamilyTraits
from ovserve.models.plans import EXACT, Plan, read_plan
from ovserve.models.presets import PRESETS, Preset, limited_presets, resolve_preset
from ovserve.models.variants import ModelFiles, variant_of
from ovserve.settings.options import BUILTIN_PREFIX, ModelSettings, Resolution

__all__ = [
    "ModelProfile",
    "Scheduling",
    "builtin_directory",
    "read_profile",
    "served_by",
    "with_denoiser_multiple",
]

# They add noise at each step, so that no prediction can be forecast: names in a model's files, and those of requests.
NOISY_SCHEDULERS = frozenset({"EulerAncestralDiscrete", "LCM", "euler_ancestral", LCM_SCHEDULER})


@dataclass(frozen=True, slots=True)
class Scheduling:
    """The scheduler named in the model's directory, and the parts of its configuration that limit a request."""

    name: str  # DDIM, PNDM, EulerDiscrete, EulerAncestralDiscrete, LCM, FlowMatchEulerDiscrete
    num_train_timesteps: int
    timestep_spacing: str  # leading, trailing, linspace
    original_inference_steps: int  # LCM only


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One model as the rest of the program sees it. Immutable; plain data.

    Attributes:
        name: value of the request field `model`.
        directory: resolved path of the model's files.
        pipeline_class: name of its row in `classes.CLASSES`.
        family: name of its row in `families.FAMILIES`.
        component_tasks: those of text2image, image2image, inpainting for which the directory has the components.
        tasks: those of them that the engine serves.
        inpainting_unet: the UNet takes mask and masked image as additional channels (9 in all).
        side_multiple_px: side of a cell of latents, or of a patch of them; both working sides are multiples of this.
        native: default working size in pixels.
        min_side_px, max_side_px: range of the sides the model was trained for.
        prompt_tokens: window of the text encoder that reads most of the prompt, special tokens included.
        text_encoders: number of text encoders (prompt_2, prompt_3 need the second and third).
        takes_negative_prompt: whether a negative prompt has any effect (classifier-free guidance).
        references: the most reference images of one request; 0 where an edit takes one image and starts from it.
        guidance: how the guidance scale acts: one of `families.CLASSIFIER_FREE`, EMBEDDED, NO_GUIDANCE.
        is_distilled: made for a few steps; half of them would give half a picture.
        scheduling: the model's own scheduler.
        defaults: values for fields that a request leaves out.
        presets: the presets that the model declares: `quality` name to the fields it sets.
        engine: the engine of `classes.ENGINES` that serves it.
        cuts_prompt: a prompt that is too long is cut, unless the request or the operator says otherwise.
        drops_unknown_words: where a prompt may be cut, words without a token of their own are left out of it.
        vae: the directory whose `vae_decoder` and `vae_encoder` replace the model's, or None.
        denoiser_multiple_px: both working sides are multiples of this too. A worker finds it in the denoiser's graph
            when it loads the model (`with_denoiser_multiple`); before, 1.
        plan: the stored plan for the options of the workers; None: the library's own.
    """

    name: str
    directory: Path
    pipeline_class: str
    family: str
    component_tasks: frozenset[str]
    tasks: frozenset[str]
    inpainting_unet: bool
    side_multiple_px: int
    native: Resolution
    min_side_px: int
    max_side_px: int
    prompt_tokens: int
    text_encoders: int
    takes_negative_prompt: bool
    references: int
    guidance: str
    is_distilled: bool
    scheduling: Scheduling
    defaults: Defaults
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: str = ""
    cuts_prompt: bool = False
    drops_unknown_words: bool = False
    denoiser_multiple_px: int = 1
    vae: Path | None = None
    plan: Plan | None = None

    @property
    def working_multiple_px(self) -> int:
        """Both working sides are multiples of this."""
        return math.lcm(self.side_multiple_px, self.denoiser_multiple_px)

    def preset(self, quality: str, scheduler: str = "") -> Preset:
        """Return the values of a `quality` preset (low, medium or high) for this model.

        Args:
            quality: the preset.
            scheduler: the one that the request names; empty for the model's own.
        """
        is_noisy = (scheduler or self.scheduling.name) in NOISY_SCHEDULERS
        return resolve_preset(
            quality,
            self.presets,
            self.defaults,
            is_distilled=self.is_distilled,
            can_forecast=self.engine == "stepwise" and not is_noisy,
        )

    def component(self, name: str) -> Path:
        """Return the directory of a component, such as `unet` or `vae_decoder`."""
        return (self.vae if self.vae is not None and name.startswith("vae") else self.directory) / name

    @property
    def traits(self) -> FamilyTraits:
        """What is known of the model's family."""
        return FAMILIES[self.family]

    @property
    def takes_strength(self) -> bool:
        """Whether an edit starts from the image with noise added to it; else it sees the image as a reference."""
        return not self.traits.edits_by_reference

    @property
    def max_images(self) -> int:
        """The most images of one edit: one to start from, or the references."""
        return max(1, self.references)

    def working_size(self, width: int, height: int) -> Resolution:
        """Return the size at which the model works on a picture of `width` x `height` pixels.

        It is the nearest size in the native range with the same aspect ratio, as far as working_multiple_px and the
        range allow. Sides are rounded up, so that fitting the result back only crops and scales.
        """
        step, low, high = self.working_multiple_px, self.min_side_px, self.max_side_px
        scale = 1.0
        if max(width, height) > high:
            scale = high / max(width, height)
        elif min(width, height) < low:
            scale = min(low / min(width, height), high / max(width, height))
        sides = (math.ceil(round(side * scale, 6) / step) * step for side in (width, height))
        return Resolution(*(min(high, max(low, side)) for side in sides))


def served_by(profile: ModelProfile, engine: str) -> ModelProfile:
    """Return the profile with the tasks and features that an engine of `classes.ENGINES` serves.

    Raises:
        ModelError: the engine does not serve models of this class, or needs components that the directory lacks.
    """
    serving = CLASSES[profile.pipeline_class].serving(engine)
    if serving is None:
        raise ModelError(f"model {profile.name}: engine {engine} does not serve class {profile.pipeline_class}")
    tasks = profile.component_tasks & serving.tasks
    if not tasks:
        raise ModelError(f"{profile.directory}: component 'vae_encoder' is missing; this class needs it")
    return dataclasses.replace(
        profile,
        engine=engine,
        tasks=tasks,
        references=serving.references if "image2image" in tasks else 0,
        takes_negative_prompt=serving.negative_prompt and profile.guidance == CLASSIFIER_FREE,
    )


def with_denoiser_multiple(profile: ModelProfile, multiple_px: int) -> ModelProfile:
    """Return the profile with working sides that are multiples of `multiple_px`: native size and range included."""
    found = dataclasses.replace(profile, denoiser_multiple_px=multiple_px)
    step = found.working_multiple_px

    def up(side: int) -> int:
        return -(-side // step) * step

    high = max(step, profile.max_side_px // step * step)
    native = Resolution(up(profile.native.width), up(profile.native.height))
    return dataclasses.replace(found, native=native, min_side_px=min(up(profile.min_side_px), high), max_side_px=high)


BUILTIN_MODELS = {"shapes": "builtin", "things": "builtin_things"}  # name to folder in the package
PROMPT_KEYS = {"too_long": ("refuse", "cut"), "unknown_words": ("keep", "drop")}  # to the values of each
SIZE_KEYS = ("native", "min_side_px", "max_side_px", "side_multiple_px")
INPAINTING_CHANNELS = 9  # latents, mask, and the masked image's latents
_FLOW_MATCHING = Scheduling("FlowMatchEulerDiscrete", 1000, "linspace", 50)
_TRANSFORMER_CELLS = 128  # side of the latents that today's transformers were trained on: 1024 pixels
_UNET_CELLS = 64


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
    """Return the JSON object in a file; `what` describes the file in the error. Raises ModelError."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: {what} is missing ({path.name})") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}", is_transient=may_pass(error)) from None
    except ValueError as error:  # not UTF-8, not JSON, a number with thousands of digits
        raise ModelError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise ModelError(f"{path}: cannot be read: nested too deeply") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return document


def _check_component(directory: Path, name: str, stem: str = "openvino_model") -> Path:
    """Return the directory of a component; raise ModelError if it, its .xml or its .bin file is missing."""
    part = directory / name
    if not part.is_dir():
        raise ModelError(f"{directory}: component {name!r} is missing")
    for suffix in (".xml", ".bin"):
        if not (part / (stem + suffix)).is_file():
            raise ModelError(f"{directory}: component {name!r} has no {stem}{suffix}")
    return part


def _number_or_default(document: dict[str, Any], key: str, default: float) -> float:
    """Return the number under `key`; the default if it is absent or not a number."""
    value = document.get(key, default)
    return default if value is None or isinstance(value, bool) or not isinstance(value, int | float) else value


def _scheduling(config: dict[str, Any], index: dict[str, Any]) -> Scheduling:
    declared = index.get("scheduler")
    name = str(config.get("_class_name") or (declared[1] if isinstance(declared, list) and len(declared) > 1 else ""))
    return Scheduling(
        name=name.removesuffix("Scheduler") or "PNDM",
        num_train_timesteps=int(_number_or_default(config, "num_train_timesteps", 1000)),
        timestep_spacing=str(config.get("timestep_spacing") or "leading"),
        original_inference_steps=int(_number_or_default(config, "original_inference_steps", 50)),
    )


def read_profile(settings: ModelSettings) -> ModelProfile:
    """Read a model's directory, then apply the operator's defaults and limits.

    Raises:
        ModelError: the built-in model is unknown, or the directory is missing, is not an image pipeline, or lacks a
            component; the message names it. Or the file of an adapter or the stored plan is missing.
        SettingsError: a default is outside the operator's limits.
    """
    given = _model_directory(settings.path)
    try:
        directory = Path(os.path.realpath(given))  # does not raise on a loop of symlinks, unlike Path.resolve
        profile = _read_directory(directory, settings)
    except OSError as error:
        raise ModelError(f"{given}: cannot be read: {error.strerror}", is_transient=may_pass(error)) from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a JSON value of an unexpected type
        raise ModelError(f"{given}: a configuration file has a wrong value: {error}") from None
    _check_defaults(profile, settings)
    for adapter in settings.lora:
        if not adapter.path.is_file():
            raise ModelError(f"adapter {adapter.alias}: {adapter.path}: no such file", is_transient=True)
    return profile


def _read_directory(directory: Path, settings: ModelSettings) -> ModelProfile:
    if not directory.is_dir():  # perhaps its file system is not mounted yet
        raise ModelError(f"{directory}: no such directory", is_transient=not directory.exists())
    if not any(directory.iterdir()):
        raise ModelError(f"{directory}: the directory is empty; is its file system mounted?", is_transient=True)
    index = _read_json(directory / "model_index.json", "the model index")
    class_name = str(index.get("_class_name", ""))
    family = class_named(class_name, directory).family
    engine, _ = plan_engine(class_name, settings.engine, settings.device, directory)
    traits = FAMILIES[family]
    denoiser = _component_config(directory, traits.denoiser, "the denoiser's configuration")
    vae = _vae_config(directory, settings)
    text = _component_config(directory, "text_encoder", "the text encoder's configuration")
    _check_component(directory, "tokenizer", "openvino_tokenizer")
    scheduler = _read_json(directory / "scheduler" / "scheduler_config.json", "the scheduler configuration")
    channels = int(_number_or_default(denoiser, "in_channels", 4))
    inpainting_unet = not traits.is_transformer and channels == INPAINTING_CHANNELS
    declared = _read_json(directory / "ovserve.json", "") if (directory / "ovserve.json").is_file() else {}
    _check_overrides(declared)
    sizes, variant = (
        _Sizes.of(traits, denoiser, vae, declared),
        variant_of(family, ModelFiles(index, denoiser, scheduler)),
    )
    profile = ModelProfile(
        name=settings.name,
        directory=directory,
        pipeline_class=class_name,
        family=family,
        component_tasks=_component_tasks(settings.vae or directory, inpainting_unet=inpainting_unet),
        tasks=frozenset(),
        inpainting_unet=inpainting_unet,
        side_multiple_px=sizes.multiple,
        native=sizes.native,
        min_side_px=sizes.low,
        max_side_px=sizes.high,
        prompt_tokens=_prompt_tokens(directory, traits, text),
        text_encoders=sum((directory / part).is_dir() for part in ("text_encoder", "text_encoder_2", "text_encoder_3")),
        takes_negative_prompt=False,
        references=0,
        guidance=variant.guidance,
        is_distilled=variant.is_distilled,
        scheduling=_FLOW_MATCHING if traits.is_transformer else _scheduling(scheduler, index),
        defaults=_defaults(variant.defaults, declared.get("defaults", {}), settings),
        presets=limited_presets(declared.get("presets", {}), settings),
        cuts_prompt=declared.get("prompts", {}).get("too_long") == "cut",
        drops_unknown_words=declared.get("prompts", {}).get("unknown_words") == "drop",
        vae=settings.vae,
        plan=None if settings.plan == EXACT else read_plan(directory, traits.denoiser, settings.device),
    )
    return served_by(profile, engine)


def _vae_config(directory: Path, settings: ModelSettings) -> dict[str, Any]:
    """Return the configuration of the VAE that decodes pictures; check it and that of previews against the model's.

    Raises:
        ModelError: a component is missing, or a VAE is for latents of another shape.
    """
    what = "the VAE's configuration"
    own = _component_config(directory, "vae_decoder", what)
    used = own
    for option, other in (("preview_vae", settings.preview_vae), ("vae", settings.vae)):
        if other is None:
            continue
        used = _component_config(other, "vae_decoder", what)
        for name, shape_of in (("channels of latents", _latent_channels), ("pixels for each of them", _vae_scale)):
            if shape_of(used) != shape_of(own):
                raise ModelError(
                    f"{option} {other} has {shape_of(used)} {name}; the model's own VAE has {shape_of(own)}"
                )
    return used if settings.vae is not None else own


def _latent_channels(vae: dict[str, Any]) -> int:
    return int(_number_or_default(vae, "latent_channels", _number_or_default(vae, "z_dim", 4)))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of a model in pixels: native size, range of the sides, and what both sides are multiples of."""

    native: Resolution
    low: int
    high: int
    multiple: int

    @classmethod
    def of(
        cls, traits: FamilyTraits, denoiser: dict[str, Any], vae: dict[str, Any], declared: dict[str, Any]
    ) -> _Sizes:
        """Return the sizes that ovserve.json declares, else those of the configurations."""
        vae_scale = _vae_scale(vae)
        cells = _TRANSFORMER_CELLS if traits.is_transformer else _UNET_CELLS
        side = int(_number_or_default(denoiser, "sample_size", cells)) * vae_scale
        sizes = declared.get("sizes", {})
        # Transformers take latents in patches of two. What a UNet export needs is found when a worker loads it.
        patch = 2 if traits.is_transformer else 1
        multiple = int(_number_or_default(sizes, "side_multiple_px", vae_scale * patch))
        return cls(
            native=Resolution.parse(sizes["native"]) if "native" in sizes else Resolution(side, side),
            low=int(_number_or_default(sizes, "min_side_px", max(multiple, side // 2))),
            high=int(_number_or_default(sizes, "max_side_px", max(side * 2, multiple))),
            multiple=multiple,
        )


def _vae_scale(vae: dict[str, Any]) -> int:
    """Return how many pixels the side of a cell of latents has: the VAE halves between its blocks."""
    for key in ("block_out_channels", "dim_mult"):  # Qwen-Image's VAE has the second
        blocks = vae.get(key)
        if isinstance(blocks, list) and blocks:
            return int(2 ** (len(blocks) - 1))
    return 8


def _check_overrides(declared: dict[str, Any]) -> None:
    """Raise ValueError for an unknown name or a wrong size in ovserve.json: a typo would be ignored silently."""
    known = {
        "defaults": tuple(f.name for f in dataclasses.fields(Defaults)),
        "sizes": SIZE_KEYS,
        "presets": PRESETS,
        "prompts": tuple(PROMPT_KEYS),
    }
    for section, names in (("", tuple(known)), *known.items()):
        for name in declared.get(section, {}) if section else declared:
            if name not in names:
                where = f"ovserve.json: {section}" if section else "ovserve.json"
                raise ValueError(f"{where}: {name!r} is not one of {', '.join(names)}")
    for name, value in declared.get("sizes", {}).items():
        if name != "native" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"ovserve.json: sizes.{name} is {value!r}; expected a whole number of pixels, 1 or more")
    for name, value in declared.get("prompts", {}).items():
        if value not in PROMPT_KEYS[name]:
            raise ValueError(
                f"ovserve.json: prompts.{name} is {value!r}; expected one of {', '.join(PROMPT_KEYS[name])}"
            )


def _component_config(directory: Path, name: str, what: str) -> dict[str, Any]:
    return _read_json(_check_component(directory, name) / "config.json", what)


def _component_tasks(directory: Path, *, inpainting_unet: bool) -> frozenset[str]:
    """Return the tasks that the components support. Raises ModelError for a VAE encoder without weights."""
    has_encoder = (directory / "vae_encoder").is_dir()
    if has_encoder:
        _check_component(directory, "vae_encoder")
    if inpainting_unet:
        return frozenset(("inpainting",))
    return frozenset(("text2image", "image2image", "inpainting") if has_encoder else ("text2image",))


def _prompt_tokens(directory: Path, traits: FamilyTraits, text: dict[str, Any]) -> int:
    """Return the window of the encoder that reads the whole prompt: T5 if the family and the directory have one."""
    if traits.window:
        return traits.window
    if traits.t5 is not None and (directory / traits.t5.encoder).is_dir():
        return traits.t5.tokens
    return int(_number_or_default(text, "max_position_embeddings", 77))


def _defaults(known: Defaults, declared: dict[str, Any], settings: ModelSettings) -> Defaults:
    """Return the defaults: the operator's, else those of ovserve.json, else the variant's."""

    def choose(operator: float | None, name: str) -> float:
        return operator if operator is not None else float(_number_or_default(declared, name, getattr(known, name)))

    def clamp(strength: float) -> float:  # the operator has no option for these defaults, only the limits
        return min(max(strength, settings.min_strength), settings.max_strength)

    return Defaults(
        num_inference_steps=int(choose(settings.default_num_inference_steps, "num_inference_steps")),
        guidance_scale=choose(settings.default_guidance_scale, "guidance_scale"),
        strength=choose(settings.default_strength, "strength"),
        strength_inpainting=clamp(choose(None, "strength_inpainting")),
        strength_variation=clamp(choose(None, "strength_variation")),
    )


def _check_defaults(profile: ModelProfile, settings: ModelSettings) -> None:
    """Raise SettingsError if a default, which a request without options would use, is outside the operator's limits.

    Also for a default of something that the model does not have.
    """
    defaults = profile.defaults
    if not profile.takes_strength and settings.default_strength is not None:
        raise SettingsError(
            f"model {profile.name}: default_strength is {settings.default_strength:g}, but this model's edits have no "
            "strength; remove it"
        )
    checks: list[tuple[str, float, float, float]] = [
        ("num_inference_steps", defaults.num_inference_steps, 1, settings.max_num_inference_steps),
        ("guidance_scale", defaults.guidance_scale, 0, settings.max_guidance_scale),
    ]
    if profile.takes_strength:
        checks.append(("strength", defaults.strength, settings.min_strength, settings.max_strength))
    for name, value, low, high in checks:
        if not low <= value <= high:
            raise SettingsError(
                f"model {profile.name}: the default {name} is {value:g}, outside the limits {low:g} to {high:g}; "
                f"change the limits or set default_{name}"
            )
