"""Settings from flags, the environment and a TOML file, checked by the tables of `ovserve.settings.options`.

Precedence: flag, then environment, then file, then default. An empty environment variable gives nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError
from ovserve.settings.options import ModelSettings, Option, Resolution, Settings, options_of, parse_origins

__all__ = ["ENVIRONMENT_PREFIX", "load_settings", "service_variables"]

ENVIRONMENT_PREFIX = "OVSERVE_"
_FLAG = re.compile(r"[a-z][a-z0-9_]*")
# What Kubernetes puts into the environment of every pod beside a Service called `ovserve` or `ovserve-SOMETHING`
# (its documentation: Service, Discovering services, Environment variables).
_SERVICE = re.compile(
    ENVIRONMENT_PREFIX
    + r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(ENVIRONMENT_PREFIX + r"([A-Z0-9_]+_)?PORT=(tcp|udp|sctp)://.*")
_SHOWN_CHARS = 100  # of a wrong value in a message


def _parse_text(kind: str, text: str) -> Any:
    """One value from a flag or the environment, by the annotation of its option. Raises ValueError."""
    if "\0" in text:  # every system call that gets it as a path or a name would raise
        raise ValueError("must not hold a NUL character")
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
    try:
        return int(value) if base == "int" else float(value)
    except OverflowError:
        raise ValueError("too large a number") from None


def _check(value: Any, option: Option, default: Any) -> None:
    """Raise ValueError unless the value obeys its option's bounds."""
    if value is None:
        return
    if value == "" and default:  # where nothing may be chosen, nothing is the default, or `none` says so
        raise ValueError("must not be empty")
    if option.choices and value not in option.choices:
        raise ValueError(f"expected one of {', '.join(option.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    unit = f" {option.unit}" if option.unit else ""
    if option.low is not None and value < option.low:
        raise ValueError(f"must be at least {option.low:g}{unit}")
    if option.high is not None and value > option.high:
        raise ValueError(f"must be at most {option.high:g}{unit}")


@dataclass(frozen=True, slots=True)
class _Source:
    """One place that gives options.

    Attributes:
        title: what messages call it.
        values: raw, by the name under which they were given.
        parse: makes a value of an option's annotation and a raw value. Raises ValueError.
        spell: what messages call an option of it, by the name.
    """

    title: str
    values: Mapping[str, Any]
    parse: Callable[[str, Any], Any]
    spell: Callable[[str], str]

    def only(self, names: set[str]) -> _Source:
        """Its options of these names."""
        return dataclasses.replace(self, values={key: value for key, value in self.values.items() if key in names})


def _table(title: str, values: Mapping[str, Any]) -> _Source:
    """A table of the file as a source."""
    return _Source(title, values, _from_toml, lambda name: f"{title}: {name}")


def _gather(table: type, sources: Sequence[_Source]) -> dict[str, Any]:
    """Values by option name, from the first source that has one. Raises SettingsError."""
    found: dict[str, Any] = {}
    for name, (entry, option) in options_of(table).items():
        for source in sources:
            keys = [key for key in (name, *option.aliases) if key in source.values]
            if len(keys) > 1:
                raise SettingsError(f"{source.title}: {keys[0]} and {keys[1]} are two names of one option: give one")
            if not keys:
                continue
            raw = source.values[keys[0]]
            try:
                value = source.parse(str(entry.type), raw)
                _check(value, option, entry.default)
            except ValueError as error:
                told = (
                    str(error)
                    if "invalid literal" not in str(error) and "could not" not in str(error)
                    else "not a number"
                )
                shown = _shown(raw) if entry.repr else "(hidden)"
                raise SettingsError(f"{source.spell(keys[0])}={shown}: {told}") from None
            found[name] = value
            break
    return found


def _shown(raw: object) -> str:
    """A wrong value in a message: one short line, whatever somebody wrote."""
    if isinstance(raw, dict | list):
        # It may be nested as deep as it likes: its text would take as deep a stack.
        return "{...}" if isinstance(raw, dict) else "[...]"
    if isinstance(raw, int) and raw.bit_length() > _SHOWN_CHARS:
        return f"a number of {raw.bit_length()} bits"  # the interpreter refuses to write out the largest
    text = str(raw)
    begin = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_SHOWN_CHARS])
    return begin if len(text) <= _SHOWN_CHARS else f"{begin}..."


def _names(table: type) -> set[str]:
    """Every name of every option of a table."""
    return {key for name, (_, option) in options_of(table).items() for key in (name, *option.aliases)}


def _check_names(source: _Source, *tables: type) -> None:
    known = set().union(*map(_names, tables))
    for name in source.values:
        if name not in known:
            raise SettingsError(f"{source.title}: unknown option {name[:_SHOWN_CHARS]!r}{_hint(name, known)}")


def _hint(name: str, known: set[str]) -> str:
    """What somebody who wrote an unknown option probably meant."""
    if name in _names(ModelSettings):
        return ": it is an option of a model, and belongs into a [[model]] table"
    if name in _names(Settings):
        return ": it is an option of the server, and belongs before the first [[model]] table"
    near = difflib.get_close_matches(name[:_SHOWN_CHARS], known, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _model_name(model: ModelSettings) -> ModelSettings:
    if model.name:
        return model
    try:
        name = (Path(os.path.realpath(model.path)).name or "model") if model.path else "ovserve-builtin"
    except OSError as error:  # a relative path, and the working directory is gone
        raise SettingsError(f"model path {model.path}: {error.strerror}") from None
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
        except ValueError as error:
            raise SettingsError(f"model {model.name}: plugin_config: {error}") from None
        except RecursionError:
            raise SettingsError(f"model {model.name}: plugin_config: nested too deeply") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:  # no TOML, no UTF-8, a number of thousands of digits
        raise SettingsError(f"--config {path}: {error}") from None
    except RecursionError:
        raise SettingsError(f"--config {path}: nested too deeply") from None


def _tables(document: dict[str, Any], title: str) -> list[_Source]:
    """Take the [[model]] tables out of the file's document. Raises SettingsError."""
    tables = document.pop("model", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{title}: write each model as a [[model]] table")
    found = []
    for number, table in enumerate(tables, 1):
        name = table.get("name", table.get("model_name"))
        source = _table(f"{title}: [[model]] {number}{f' ({_shown(name)})' if name else ''}", table)
        _check_names(source, ModelSettings)
        found.append(source)
    return found


def service_variables(environment: Mapping[str, str]) -> list[str]:
    """The variables that are no options of ours: Kubernetes has made them for a Service whose name begins with ours."""
    return [
        key
        for key, value in environment.items()
        if _SERVICE.fullmatch(key) or _SERVICE_PORT.fullmatch(f"{key}={value}")
    ]


def _from_environment(environment: Mapping[str, str]) -> _Source:
    """The options that the environment gives. Raises SettingsError for a variable that names none.

    An empty variable gives nothing: that is what a file of services makes of `OVSERVE_HOST=${HOST}` where HOST is not set, and
    an empty host would mean every interface.
    """
    foreign = {f"{ENVIRONMENT_PREFIX}CONFIG", *service_variables(environment)}
    own = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in foreign
    }
    if stray := [key for key in own if not _FLAG.fullmatch(key)]:
        raise SettingsError(f"environment: unknown option {ENVIRONMENT_PREFIX}{stray[0].upper()}")
    source = _Source("environment", own, _parse_text, lambda name: f"{ENVIRONMENT_PREFIX}{name.upper()}")
    _check_names(source, Settings, ModelSettings)
    return dataclasses.replace(source, values={key: value for key, value in own.items() if value})


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """Make the settings from flags (`{"max_body_bytes": "1000"}`), the environment and a TOML file.

    The options of a model given as flags or in the environment describe the only model; with `[[model]]` tables in the file
    they are refused, for it would be unclear which one they mean.

    Raises:
        SettingsError: an unknown option, a wrong value, or options that contradict one another.
    """
    sources = (_Source("flag", flags, _parse_text, "--{}".format), _from_environment(environment))
    _check_names(sources[0], Settings, ModelSettings)
    of_server = [source.only(_names(Settings)) for source in sources]
    of_model = [source.only(_names(ModelSettings)) for source in sources]
    document = _read_file(config) if config else {}
    tables = _tables(document, str(config))
    file = _table(str(config), document)
    _check_names(file, Settings)
    if tables and (loose := [source.spell(name) for source in of_model for name in source.values]):
        raise SettingsError(f"{loose[0]} was given beside [[model]] tables: put it into the table it is meant for")
    given = [[table] for table in tables] or [of_model]
    models = [_model_name(ModelSettings(**_gather(ModelSettings, each))) for each in given]
    for model in models:
        _check_model(model)
    names = [model.name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"two models are called {twice[0]!r}")
    values = _gather(Settings, [*of_server, file])
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
