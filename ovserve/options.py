"""Settings from flags, the environment and a TOML file, checked by the tables of `ovserve.config`.

Precedence: flag, then environment, then file, then default.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovserve.config import ModelSettings, Option, Resolution, Settings, options_of, parse_origins
from ovserve.errors import SettingsError

__all__ = ["ENVIRONMENT_PREFIX", "load_settings"]

ENVIRONMENT_PREFIX = "OVSERVE_"
_FLAG = re.compile(r"[a-z][a-z0-9_]*")


def _parse_text(kind: str, text: str) -> Any:
    """One value from a flag or the environment, by the annotation of its option. Raises ValueError."""
    base = kind.removesuffix(" | None")
    if base != kind and text in ("", "none"):
        return None
    parsers: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": lambda t: int(t, 10),
        "float": float,
        "Path": Path,
        "Resolution": Resolution.parse,
    }
    return parsers[base](text)


def _from_toml(kind: str, value: object) -> Any:
    """One value from the file, by the annotation of its option. Raises ValueError."""
    base = kind.removesuffix(" | None")
    if base in ("str", "Path", "Resolution"):
        if not isinstance(value, str):
            raise ValueError("expected a string")
        return _parse_text(kind, value)
    if isinstance(value, bool) or not isinstance(value, int if base == "int" else int | float):
        raise ValueError("expected a whole number" if base == "int" else "expected a number")
    return int(value) if base == "int" else float(value)


def _check(value: Any, option: Option) -> None:
    """Raise ValueError unless the value obeys its option's bounds."""
    if value is None:
        return
    if option.choices and value not in option.choices:
        raise ValueError(f"expected one of {', '.join(option.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    unit = f" {option.unit}" if option.unit else ""
    if option.low is not None and value < option.low:
        raise ValueError(f"must be at least {option.low:g}{unit}")
    if option.high is not None and value > option.high:
        raise ValueError(f"must be at most {option.high:g}{unit}")


def _gather(table: type, sources: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Values by option name from (where, mapping) sources, the first that has one wins. Raises SettingsError."""
    found: dict[str, Any] = {}
    for name, (entry, option) in options_of(table).items():
        for where, mapping in sources:
            keys = [key for key in (name, *option.aliases) if key in mapping]
            if len(keys) > 1:
                raise SettingsError(f"{where}: {keys[0]} and {keys[1]} are two names of one option: give one")
            if not keys:
                continue
            raw = mapping[keys[0]]
            try:
                kind = str(entry.type)
                value = _parse_text(kind, raw) if where != "file" else _from_toml(kind, raw)
                _check(value, option)
            except ValueError as error:
                spelled = {"flag": f"--{keys[0]}", "environment": f"{ENVIRONMENT_PREFIX}{keys[0].upper()}"}
                told = (
                    str(error)
                    if "invalid literal" not in str(error) and "could not" not in str(error)
                    else "not a number"
                )
                raise SettingsError(
                    f"{spelled.get(where, keys[0])}={raw if entry.repr else '(hidden)'}: {told}"
                ) from None
            found[name] = value
            break
    return found


def _check_names(table: type, mapping: Mapping[str, Any], where: str) -> None:
    known = {key for name, (_, option) in options_of(table).items() for key in (name, *option.aliases)}
    for name in mapping:
        if name not in known:
            raise SettingsError(f"{where}: unknown option {name!r}")


def _model_name(model: ModelSettings) -> ModelSettings:
    if model.name:
        return model
    name = (model.path.resolve().name or "model") if model.path else "ovserve-builtin"
    return dataclasses.replace(model, name=name)


def _check_model(model: ModelSettings) -> None:
    """Rules between options of one model. Raises SettingsError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}", model.name):
        raise SettingsError(f"model name {model.name!r}: letters, digits and ._/:@- only, at most 128")
    if model.min_strength > model.max_strength:
        raise SettingsError(f"model {model.name}: min_strength is above max_strength")
    if model.default_strength is not None and not model.min_strength <= model.default_strength <= model.max_strength:
        raise SettingsError(f"model {model.name}: default_strength is outside min_strength..max_strength")
    steps = model.default_num_inference_steps
    if steps is not None and steps > model.max_num_inference_steps:
        raise SettingsError(f"model {model.name}: default_num_inference_steps is above max_num_inference_steps")
    guidance = model.default_guidance_scale
    if guidance is not None and guidance > model.max_guidance_scale:
        raise SettingsError(f"model {model.name}: default_guidance_scale is above max_guidance_scale")
    size = model.default_resolution
    if size and (size.width > model.max_resolution.width or size.height > model.max_resolution.height):
        raise SettingsError(
            f"model {model.name}: default_resolution {size} is above max_resolution {model.max_resolution}"
        )
    if len(model.device.split()) not in (1, 3):
        raise SettingsError(f"model {model.name}: device: expected one device, or three: text encoder, denoiser, VAE")
    if model.plugin_config:
        try:
            if not isinstance(json.loads(model.plugin_config), dict):
                raise SettingsError(f"model {model.name}: plugin_config: expected a JSON object")
        except json.JSONDecodeError as error:
            raise SettingsError(f"model {model.name}: plugin_config: {error}") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from None


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """Make the settings from flags (`{"max_body_bytes": "1000"}`), the environment and a TOML file.

    The options of a model given as flags or in the environment describe the only model; with `[[model]]` tables in the file
    they are refused, for it would be unclear which one they mean.

    Raises:
        SettingsError: an unknown option, a wrong value, or options that contradict one another.
    """
    own = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX)
    }
    own.pop("config", None)
    server_names = {key for name, (_, option) in options_of(Settings).items() for key in (name, *option.aliases)}
    if stray := [key for key in own if not _FLAG.fullmatch(key)]:
        raise SettingsError(f"environment: unknown option {ENVIRONMENT_PREFIX}{stray[0].upper()}")
    split: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    for where, mapping in (("flag", flags), ("environment", own)):
        server = {key: value for key, value in mapping.items() if key in server_names}
        only_model = {key: value for key, value in mapping.items() if key not in server_names}
        _check_names(ModelSettings, only_model, where)
        split[where] = (server, only_model)
    document = _read_file(config) if config else {}
    tables = document.pop("model", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError("file: write each model as a [[model]] table")
    _check_names(Settings, document, "file")
    loose = split["flag"][1] or split["environment"][1]
    if tables and loose:
        raise SettingsError(
            f"{next(iter(loose))!r} was given beside [[model]] tables: put it into the table it is meant for"
        )
    if tables:
        for table in tables:
            _check_names(ModelSettings, table, "file: [[model]]")
        models = [ModelSettings(**_gather(ModelSettings, [("file", table)])) for table in tables]
    else:
        models = [ModelSettings(**_gather(ModelSettings, [(where, split[where][1]) for where in split]))]
    models = [_model_name(model) for model in models]
    for model in models:
        _check_model(model)
    names = [model.name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"two models are called {twice[0]!r}")
    values = _gather(Settings, [*((where, split[where][0]) for where in split), ("file", document)])
    settings = Settings(**values, models=tuple(models))
    if settings.default_model and settings.default_model not in names:
        raise SettingsError(f"default_model {settings.default_model!r} is none of the models: {', '.join(names)}")
    try:
        parse_origins(settings.allowed_origins)
    except ValueError as error:
        raise SettingsError(f"allowed_origins: {error}") from None
    if settings.default_timeout_s > settings.max_timeout_s:
        raise SettingsError("default_timeout_s is above max_timeout_s")
    return settings
