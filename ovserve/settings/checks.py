"""Check options against each other: those of a model, those of all models, and where the server listens."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ovserve.errors import SettingsError
from ovserve.settings.access import parse_listen
from ovserve.settings.loras import MAX_ADAPTERS
from ovserve.settings.modelserver.graph import check_rules
from ovserve.settings.options import CATCH_ALL, ModelSettings, Resolution, Settings
from ovserve.settings.placement import parse_placement
from ovserve.settings.values import SHOWN_CHARS, shortened

__all__ = ["MAX_LISTENERS", "check_listening", "check_model", "check_static", "check_unique_names"]

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_NAME_GRAMMAR = "expected at most 128 letters, digits and ._/:@-, beginning with a letter or digit"
MAX_LISTENERS = 16  # in `listen`; each has three threads


def check_model(model: ModelSettings) -> None:
    """Check the options of one model against each other. Raises SettingsError."""
    if not _MODEL_NAME.fullmatch(model.name):
        raise SettingsError(f"model name {model.name!r}: {_NAME_GRAMMAR}")
    for alias in model.aliases:
        if alias != CATCH_ALL and not _MODEL_NAME.fullmatch(alias):
            raise SettingsError(f"model {model.name}: alias {alias[:SHOWN_CHARS]!r}: {_NAME_GRAMMAR}; or *")
    try:
        parse_placement(model.placement)
    except ValueError as error:
        raise SettingsError(f"model {model.name}: placement: {error}") from None
    _check_adapters(model)
    if model.keep_alive_s is not None and -1 < model.keep_alive_s < 0:
        raise SettingsError(
            f"model {model.name}: keep_alive_s is {model.keep_alive_s:g}; expected 0 or more, or -1 for ever"
        )
    if model.min_replicas > model.max_replicas:
        raise SettingsError(
            f"model {model.name}: min_replicas {model.min_replicas} is above max_replicas {model.max_replicas}"
        )
    if model.min_strength > model.max_strength:
        raise SettingsError(
            f"model {model.name}: min_strength {model.min_strength:g} is above max_strength {model.max_strength:g}"
        )
    if model.default_strength is not None and not model.min_strength <= model.default_strength <= model.max_strength:
        raise SettingsError(
            f"model {model.name}: default_strength {model.default_strength:g} is outside "
            f"{model.min_strength:g}..{model.max_strength:g}"
        )
    steps = model.default_num_inference_steps
    if steps is not None and steps > model.max_num_inference_steps:
        raise SettingsError(
            f"model {model.name}: default_num_inference_steps {steps} is above max_num_inference_steps "
            f"{model.max_num_inference_steps}"
        )
    guidance = model.default_guidance_scale
    if guidance is not None and guidance > model.max_guidance_scale:
        raise SettingsError(
            f"model {model.name}: default_guidance_scale {guidance:g} is above max_guidance_scale "
            f"{model.max_guidance_scale:g}"
        )
    size = model.default_resolution
    if (
        size
        and not model.resolution
        and (size.width > model.max_resolution.width or size.height > model.max_resolution.height)
    ):
        raise SettingsError(
            f"model {model.name}: default_resolution {size} is above max_resolution {model.max_resolution}"
        )
    if model.source_model and model.path is not None:
        raise SettingsError(f"model {model.name}: path and source_model exclude each other; remove one")
    if model.source_model and (not _REPOSITORY.fullmatch(model.source_model) or ".." in model.source_model):
        raise SettingsError(f"model {model.name}: source_model {shortened(model.source_model)!r}: expected OWNER/NAME")
    if not _REVISION.fullmatch(model.revision) or ".." in model.revision:
        raise SettingsError(
            f"model {model.name}: revision {shortened(model.revision)!r}: expected a branch, tag or commit"
        )
    if len(model.device.split()) not in (1, 3):
        raise SettingsError(
            f"model {model.name}: device: expected one device, or three for text encoder, denoiser and VAE"
        )
    if model.plugin_config:
        try:
            _check_plugin_config(model, json.loads(model.plugin_config))
        except ValueError as error:
            raise SettingsError(f"model {model.name}: plugin_config: {error}") from None
        except RecursionError:
            raise SettingsError(f"model {model.name}: plugin_config: nested too deeply") from None


def _check_plugin_config(model: ModelSettings, config: object) -> None:
    """Raise SettingsError unless it is an object without properties that an option of the model sets too."""
    if not isinstance(config, dict):
        raise SettingsError(f"model {model.name}: plugin_config: expected a JSON object")
    for key, option in (("CACHE_DIR", "cache_dir"), ("NUM_STREAMS", "streams")):
        if key in config and getattr(model, option):
            raise SettingsError(f"model {model.name}: plugin_config has {key}, and {option} is given too; remove one")


def _check_adapters(model: ModelSettings) -> None:
    """Check the names and files of adapters, and the components of composites. Raises SettingsError."""
    title = f"model {model.name}"
    if len(model.lora) > MAX_ADAPTERS:
        raise SettingsError(f"{title}: {len(model.lora)} LoRA adapters; at most {MAX_ADAPTERS} are allowed")
    for name in model.adapter_names:
        if not _MODEL_NAME.fullmatch(name):
            raise SettingsError(f"{title}: alias {name[:SHOWN_CHARS]!r}: {_NAME_GRAMMAR}")
    known = {adapter.alias for adapter in model.lora}
    for composite in model.composite:
        names = [name for name, _ in composite.components]
        if not names or len(set(names)) < len(names):
            raise SettingsError(f"{title}: composite {composite.alias}: name one or more adapters, each once")
        for name in names:
            if name not in known:
                raise SettingsError(
                    f"{title}: composite {composite.alias}: {name[:SHOWN_CHARS]!r} is not one of its adapters: "
                    f"{', '.join(sorted(known)) or 'it has none'}"
                )


def check_unique_names(models: Sequence[ModelSettings]) -> set[str]:
    """Return every name and alias, adapters and composites included. Raises SettingsError for one given twice."""
    owners: dict[str, str] = {}
    for model in models:
        if model.name in owners:
            raise SettingsError(f"two models have the name {model.name!r}")
        owners[model.name] = model.name
    for model in models:
        for alias in model.further_names:
            if alias in owners:
                owner = owners[alias]
                what = "the name of a model" if owner == alias else f"also an alias of model {owner}"
                raise SettingsError(f"model {model.name}: alias {alias!r} is {what}; remove one of them")
            owners[alias] = model.name
    return owners.keys() - {CATCH_ALL}


def check_static(model: ModelSettings, given: Mapping[str, Any]) -> ModelSettings:
    """Check `resolution` and what depends on it; return the model with its default size. Raises SettingsError."""
    options: dict[str, Any] = {
        "device": model.device,
        "resolution": [str(size) for size in model.resolution],
        "num_images_per_prompt": model.num_images_per_prompt,
        "guidance_scale": model.guidance_scale,
    }
    options |= {name: str(given[name]) for name in ("max_resolution", "default_resolution") if given.get(name)}
    if "max_num_images_per_prompt" in given:
        options["max_num_images_per_prompt"] = model.max_num_images_per_prompt
    try:
        check_rules(options)
    except ValueError as error:
        raise SettingsError(f"model {model.name}: {error}") from None
    if not model.resolution:
        return model
    return dataclasses.replace(
        model,
        default_resolution=model.default_resolution or model.resolution[0],
        max_resolution=Resolution(max(s.width for s in model.resolution), max(s.height for s in model.resolution)),
    )


def check_listening(settings: Settings) -> None:
    """Check where the server listens, and the options of TLS against each other. Raises SettingsError."""
    for text in settings.listen:
        try:
            parse_listen(text)
        except ValueError as error:
            raise SettingsError(f"listen: {text[:SHOWN_CHARS]!r}: {error}") from None
    if len(set(settings.listen)) < len(settings.listen):
        raise SettingsError("listen: an address is given twice")
    if len(settings.listen) > MAX_LISTENERS:
        raise SettingsError(f"listen: {len(settings.listen)} addresses; at most {MAX_LISTENERS} are allowed")
    if not re.fullmatch("[0-7]{3,4}", settings.socket_mode) or int(settings.socket_mode, 8) & ~0o777:
        raise SettingsError(f"socket_mode={shortened(settings.socket_mode)}: expected three octal digits, such as 660")
    for text in (*settings.listen, settings.admin_listen or ""):
        if text.startswith("https://") and settings.tls_certificate is None:
            raise SettingsError(f"listen: {text} needs the option tls_certificate")
    if settings.proxy_protocol and not settings.trusted_proxies:
        raise SettingsError("proxy_protocol has no effect without trusted_proxies")
    for name in ("tls_key", "tls_client_ca"):
        if getattr(settings, name) is not None and settings.tls_certificate is None:
            raise SettingsError(f"{name} has no effect without tls_certificate")
