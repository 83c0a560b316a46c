"""Read the settings from flags, the environment and a TOML file; check them by the tables of options.

Precedence: flag, environment, file, default. An empty environment variable counts as unset.
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
from ovserve.settings.access import parse_hosts, parse_listen, parse_networks, parse_origins
from ovserve.settings.loras import MAX_ADAPTERS, LoraSettings, parse_composites, parse_loras, parse_source_loras
from ovserve.settings.modelserver.graph import GRAPH_FILE, check_rules, read_graph
from ovserve.settings.modelserver.repository import Repository, is_json, read_config, read_repository
from ovserve.settings.options import (
    BUILTIN_NAME,
    BUILTIN_PREFIX,
    CATCH_ALL,
    ModelSettings,
    Option,
    Resolution,
    Settings,
    options_of,
)
from ovserve.settings.repositories import adapter_file, default_root

__all__ = ["ENVIRONMENT_PREFIX", "load_settings", "service_variables"]

ENVIRONMENT_PREFIX = "OVSERVE_"
_FLAG = re.compile(r"[a-z][a-z0-9_]*")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
# Variables that Kubernetes sets in every pod for a Service called `ovserve` or `ovserve-SOMETHING` (its documentation:
# Service, Discovering services, Environment variables).
_SERVICE = re.compile(
    ENVIRONMENT_PREFIX
    + r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(ENVIRONMENT_PREFIX + r"([A-Z0-9_]+_)?PORT=(tcp|udp|sctp)://.*")
_ACCESS_OPTIONS: Mapping[str, Callable[[str | None], object]] = {
    "allowed_origins": parse_origins,
    "allowed_hosts": parse_hosts,
    "trusted_proxies": parse_networks,
    "admin_listen": parse_listen,
}
_INNER_TABLES: Mapping[str, Callable[[object, str], Any]] = {"lora": parse_loras, "composite": parse_composites}
_NAME_GRAMMAR = "expected at most 128 letters, digits and ._/:@-, beginning with a letter or digit"
MAX_LISTENERS = 16  # in `listen`; each has three threads
_SHOWN_CHARS = 100  # of a wrong value, quoted in a message


def _parse_text(kind: str, text: str) -> Any:
    """Parse one value of a flag or a variable by the annotation of its option. Raises ValueError."""
    if "\0" in text:  # a system call with such a path or name raises
        raise ValueError("must not contain a NUL character")
    base = kind.removesuffix(" | None")
    if base != kind and text in ("", "none"):
        return None
    parsers: dict[str, Callable[[str], Any]] = {
        "str": str,
        "bool": _parse_bool,
        "tuple[str, ...]": lambda t: tuple(name for part in t.split(",") if (name := part.strip())),
        "int": lambda t: int(t, 10),
        "float": float,
        "Replicas": lambda t: 0 if t == "auto" else _at_least_one(int(t, 10)),
        "Path": Path,
        "Resolution": Resolution.parse,
        "tuple[Resolution, ...]": _parse_resolutions,
    }
    return parsers[base](text)


def _at_least_one(value: int) -> int:
    if value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def _parse_resolutions(text: str) -> tuple[Resolution, ...]:
    found = tuple(Resolution.parse(each) for each in text.replace(",", " ").split())
    if len(set(found)) < len(found):
        raise ValueError("a size is listed twice")
    return found


def _parse_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("expected true or false")
    return text == "true"


def _from_toml(kind: str, value: object) -> Any:
    """Check one value of the file by the annotation of its option. Raises ValueError."""
    base = kind.removesuffix(" | None")
    if base in ("str", "Path", "Resolution"):
        if not isinstance(value, str):
            raise ValueError("expected a string")
        return _parse_text(kind, value)
    if base == "Replicas":
        if value == "auto":
            return 0
        return _at_least_one(_from_toml("int", value))
    if base == "bool":
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if base in ("tuple[str, ...]", "tuple[Resolution, ...]"):
        items = value if isinstance(value, list) else [value]
        names = [name for name in items if isinstance(name, str)]
        if len(names) < len(items):
            raise ValueError("expected a list of strings")
        return _parse_text(kind, ",".join(names))
    if isinstance(value, bool) or not isinstance(value, int if base == "int" else int | float):
        raise ValueError("expected a whole number" if base == "int" else "expected a number")
    try:
        return int(value) if base == "int" else float(value)
    except OverflowError:
        raise ValueError("the number is too large") from None


def _check(value: Any, option: Option, default: Any) -> None:
    """Raise ValueError if the value is outside the bounds of its option."""
    if value is None:
        return
    if value == "" and default:  # options that can be unset have no default, or accept `none`
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
    """One source of options: the flags, the environment, or a table of the file.

    Attributes:
        title: its name in messages.
        values: raw values, by the name as given.
        parse: converts an option's annotation and a raw value to a value. Raises ValueError.
        spell: converts an option's name to the form used in messages.
    """

    title: str
    values: Mapping[str, Any]
    parse: Callable[[str, Any], Any]
    spell: Callable[[str], str]

    def only(self, names: set[str]) -> _Source:
        """Return the source with only these names."""
        return dataclasses.replace(self, values={key: value for key, value in self.values.items() if key in names})


_Given = tuple[_Source, dict[str, Any]]  # the options of one table, and its inner tables


def _table(title: str, values: Mapping[str, Any]) -> _Source:
    """Return a table of the file as a source."""
    return _Source(title, values, _from_toml, lambda name: f"{title}: {name}")


def _gather(table: type, sources: Sequence[_Source]) -> dict[str, Any]:
    """Return the values by option name, each from the first source that has it. Raises SettingsError."""
    found: dict[str, Any] = {}
    for name, (entry, option) in options_of(table).items():
        for source in sources:
            keys = [key for key in (name, *option.aliases) if key in source.values]
            if len(keys) > 1:
                raise SettingsError(
                    f"{source.title}: {keys[0]} and {keys[1]} are two names of the same option; give only one"
                )
            if not keys:
                continue
            raw = source.values[keys[0]]
            try:
                value = source.parse(str(entry.type), raw)
                _check(value, option, entry.default)
            except ValueError as error:
                not_numeric = "invalid literal" in str(error) or "could not" in str(error)
                problem = "not a number" if not_numeric else str(error)
                shown = _shown(raw) if entry.repr else "(hidden)"
                raise SettingsError(f"{source.spell(keys[0])}={shown}: {problem}") from None
            found[name] = value
            break
    return found


def _shown(raw: object) -> str:
    """Return a wrong value as one short line for a message."""
    if isinstance(raw, dict | list):
        # Not written out: deep nesting would overflow the stack.
        return "{...}" if isinstance(raw, dict) else "[...]"
    if isinstance(raw, int) and raw.bit_length() > _SHOWN_CHARS:
        return f"a number of {raw.bit_length()} bits"  # str() refuses very large integers
    text = str(raw)
    begin = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_SHOWN_CHARS])
    return begin if len(text) <= _SHOWN_CHARS else f"{begin}..."


def _names(table: type) -> set[str]:
    """Return all names of all options of a table."""
    return {key for name, (_, option) in options_of(table).items() for key in (name, *option.aliases)}


def _check_names(source: _Source, *tables: type) -> None:
    known = set().union(*map(_names, tables))
    for name in source.values:
        if name not in known:
            raise SettingsError(f"{source.title}: unknown option {name[:_SHOWN_CHARS]!r}{_hint(name, known)}")


def _hint(name: str, known: set[str]) -> str:
    """Return the likely correction of an unknown option name, or an empty string."""
    if name in _names(ModelSettings):
        return ": it is an option of a model; put it into a [[model]] table"
    if name in _names(Settings):
        return ": it is an option of the server; put it before the first [[model]] table"
    near = difflib.get_close_matches(name[:_SHOWN_CHARS], known, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _model_name(model: ModelSettings) -> ModelSettings:
    """Return the settings with a name: the given one, else that of the built-in model or of the directory."""
    if model.name:
        return model
    if model.source_model:
        return dataclasses.replace(model, name=model.source_model)
    if model.path is None or str(model.path).startswith(BUILTIN_PREFIX):
        return dataclasses.replace(model, name=BUILTIN_NAME)
    try:
        name = Path(os.path.realpath(model.path)).name or "model"
    except OSError as error:  # a relative path, and the working directory is gone
        raise SettingsError(f"model path {model.path}: {error.strerror}") from None
    return dataclasses.replace(model, name=name)


def _check_model(model: ModelSettings) -> None:
    """Check the options of one model against each other. Raises SettingsError."""
    if not _MODEL_NAME.fullmatch(model.name):
        raise SettingsError(f"model name {model.name!r}: {_NAME_GRAMMAR}")
    for alias in model.aliases:
        if alias != CATCH_ALL and not _MODEL_NAME.fullmatch(alias):
            raise SettingsError(f"model {model.name}: alias {alias[:_SHOWN_CHARS]!r}: {_NAME_GRAMMAR}; or *")
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
        raise SettingsError(f"model {model.name}: source_model {_shown(model.source_model)!r}: expected OWNER/NAME")
    if not _REVISION.fullmatch(model.revision) or ".." in model.revision:
        raise SettingsError(
            f"model {model.name}: revision {_shown(model.revision)!r}: expected a branch, tag or commit"
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


def _with_source_loras(model: ModelSettings, root: Path) -> ModelSettings:
    """Return the settings with the adapters that the option `source_loras` names. Raises SettingsError.

    Args:
        model: the settings.
        root: the directory of pulled repositories.
    """
    if not model.source_loras:
        return model
    sources, composites = parse_source_loras(model.source_loras)
    found = []
    for source in sources:
        if source.kind == "url":
            message = (
                f"source_loras: {source.alias}: {source.place} is not on this machine; download it, and give its path"
            )
            raise SettingsError(message)
        is_file = source.kind == "file"
        try:
            path = Path(source.place) if is_file else adapter_file(root, source.place, source.file)
        except SettingsError as error:
            raise SettingsError(f"source_loras: {source.alias}: {error}") from None
        alpha = 1.0 if source.alpha is None else source.alpha
        found.append(LoraSettings(alias=source.alias, path=path, alpha=alpha))
    return dataclasses.replace(model, lora=(*model.lora, *found), composite=(*model.composite, *composites))


def _check_adapters(model: ModelSettings) -> None:
    """Check the names and files of adapters, and the components of composites. Raises SettingsError."""
    title = f"model {model.name}"
    if len(model.lora) > MAX_ADAPTERS:
        raise SettingsError(f"{title}: {len(model.lora)} LoRA adapters; at most {MAX_ADAPTERS} are allowed")
    for name in model.adapter_names:
        if not _MODEL_NAME.fullmatch(name):
            raise SettingsError(f"{title}: alias {name[:_SHOWN_CHARS]!r}: {_NAME_GRAMMAR}")
    known = {adapter.alias for adapter in model.lora}
    for composite in model.composite:
        names = [name for name, _ in composite.components]
        if not names or len(set(names)) < len(names):
            raise SettingsError(f"{title}: composite {composite.alias}: name one or more adapters, each once")
        for name in names:
            if name not in known:
                raise SettingsError(
                    f"{title}: composite {composite.alias}: {name[:_SHOWN_CHARS]!r} is not one of its adapters: "
                    f"{', '.join(sorted(known)) or 'it has none'}"
                )


def _check_unique_names(models: Sequence[ModelSettings]) -> set[str]:
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


def _read_file(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file, or the models of a reference server's config.json. Raises SettingsError."""
    try:
        content = path.read_bytes()
        if is_json(content):
            return {"model": read_config(path)}
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number with thousands of digits
        raise SettingsError(f"--config {path}: {error}") from None
    except RecursionError:
        raise SettingsError(f"--config {path}: nested too deeply") from None


def _tables(document: dict[str, Any], title: str) -> list[_Given]:
    """Remove the [[model]] tables from the document; return each as a source, and its inner tables by option name.

    Raises:
        SettingsError: something is not a table, or has an unknown option.
    """
    tables = document.pop("model", [])
    if isinstance(tables, Repository):
        return _repository_tables(tables)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{title}: write each model as a [[model]] table")
    found = []
    for number, table in enumerate(tables, 1):
        name = table.get("name", table.get("model_name"))
        found.append(_split_table(f"{title}: [[model]] {number}{f' ({_shown(name)})' if name else ''}", table))
    return found


def _split_table(where: str, table: Mapping[str, Any]) -> _Given:
    """Return the table of a model as a source, and its inner tables by option name. Raises SettingsError."""
    values = dict(table)
    inner = {option: parse(values.pop(option), where) for option, parse in _INNER_TABLES.items() if option in values}
    source = _table(where, values)
    _check_names(source, ModelSettings)
    return source, inner


def _repository_tables(repository: Repository) -> list[_Given]:
    return [_split_table(where, values) for where, values in repository.tables]


def _with_graph(
    sources: list[_Source], inner: Mapping[str, Any], ignored: list[str]
) -> tuple[list[_Source], Mapping[str, Any]]:
    """Add the options of a graph.pbtxt in the model's directory; adds to `ignored` what has no meaning.

    Raises:
        SettingsError: the graph is wrong, or it and another source give different values.
    """
    given = _gather(ModelSettings, sources)
    path, reads = given.get("path"), given.get("graph_options", "read") == "read"
    if path is None or not reads or str(path).startswith(BUILTIN_PREFIX) or not (path / GRAPH_FILE).is_file():
        return sources, inner
    title = str(path / GRAPH_FILE)
    graph = read_graph(path / GRAPH_FILE)
    ignored += [f"{title}: {each}" for each in graph.ignored]
    source, adapters = _split_table(title, graph.values)
    for name, value in {**_gather(ModelSettings, [source]), **adapters}.items():
        other = inner.get(name) if name in adapters else given.get(name, value)
        if other and other != value and name != "path":
            where = next((each.title for each in sources if name in _gather(ModelSettings, [each])), sources[0].title)
            shown = f" {_plain(value)}, but {where} gives {_plain(other)}" if name not in adapters else " in both files"
            raise SettingsError(f"{title}: {name} is{shown}; remove one of them, or set graph_options to ignore")
    changes = {"path": graph.values["path"]}  # in place of the graph's directory
    if "name" not in given:
        changes["name"] = Path(os.path.realpath(path)).name or "model"
    return [_table(title, changes), *sources, source], {**inner, **adapters}


def _plain(value: object) -> str:
    """Return an option's value for a message."""
    return _shown(" ".join(map(str, value)) if isinstance(value, tuple) else value)


def _check_static(model: ModelSettings, given: Mapping[str, Any]) -> ModelSettings:
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


def service_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that Kubernetes set for a Service named like this program; they are not options."""
    return [
        key
        for key, value in environment.items()
        if _SERVICE.fullmatch(key) or _SERVICE_PORT.fullmatch(f"{key}={value}")
    ]


def _from_environment(environment: Mapping[str, str]) -> _Source:
    """Return the options of the environment. Raises SettingsError for an unknown one.

    An empty variable counts as unset: service files make one from `OVSERVE_HOST=${HOST}` when HOST is not set, and an
        empty host would mean every interface.
    """
    foreign = {f"{ENVIRONMENT_PREFIX}CONFIG", *service_variables(environment)}
    own = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in foreign
    }
    if stray := [key for key in own if not _FLAG.fullmatch(key)]:
        raise SettingsError(f"environment: unknown option {ENVIRONMENT_PREFIX}{stray[0].upper()}")
    if root := environment.get("OVMS_MODEL_REPOSITORY_PATH"):
        own.setdefault("model_repository_path", root)
    source = _Source("environment", own, _parse_text, lambda name: f"{ENVIRONMENT_PREFIX}{name.upper()}")
    _check_names(source, Settings, ModelSettings)
    return dataclasses.replace(source, values={key: value for key, value in own.items() if value})


def _check_listening(settings: Settings) -> None:
    """Check where the server listens, and the options of TLS against each other. Raises SettingsError."""
    for text in settings.listen:
        try:
            parse_listen(text)
        except ValueError as error:
            raise SettingsError(f"listen: {text[:_SHOWN_CHARS]!r}: {error}") from None
    if len(set(settings.listen)) < len(settings.listen):
        raise SettingsError("listen: an address is given twice")
    if len(settings.listen) > MAX_LISTENERS:
        raise SettingsError(f"listen: {len(settings.listen)} addresses; at most {MAX_LISTENERS} are allowed")
    if not re.fullmatch("[0-7]{3,4}", settings.socket_mode) or int(settings.socket_mode, 8) & ~0o777:
        raise SettingsError(f"socket_mode={_shown(settings.socket_mode)}: expected three octal digits, such as 660")
    for text in (*settings.listen, settings.admin_listen or ""):
        if text.startswith("https://") and settings.tls_certificate is None:
            raise SettingsError(f"listen: {text} needs the option tls_certificate")
    for name in ("tls_key", "tls_client_ca"):
        if getattr(settings, name) is not None and settings.tls_certificate is None:
            raise SettingsError(f"{name} has no effect without tls_certificate")


def _read_model(
    sources: list[_Source], inner: Mapping[str, Any], root: Path | None, ignored: list[str]
) -> ModelSettings:
    """Return one model from its sources and inner tables. Raises SettingsError.

    Args:
        sources: those of its options.
        inner: adapters and composites.
        root: the directory of pulled repositories; None: the default.
        ignored: what has no meaning is added.
    """
    found, inner = _with_graph(sources, inner, ignored)
    given = _gather(ModelSettings, found)
    model = _check_static(_model_name(ModelSettings(**given, **inner)), given)
    model = _with_source_loras(model, root or default_root())
    _check_model(model)
    return model


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """Return the settings from flags (`{"max_body_bytes": "1000"}`), the environment and a TOML file.

    Options of a model given as flags or in the environment describe the only model. With `[[model]]` tables in the file
    they
    are an error: it would be unclear which model they describe.

    Raises:
        SettingsError: an unknown option, a wrong value, or contradictory options.
    """
    sources = (_Source("flag", flags, _parse_text, "--{}".format), _from_environment(environment))
    _check_names(sources[0], Settings, ModelSettings)
    of_server = [source.only(_names(Settings)) for source in sources]
    of_model = [source.only(_names(ModelSettings)) for source in sources]
    document = _read_file(config) if config else {}
    ignored = list(document["model"].ignored) if isinstance(document.get("model"), Repository) else []
    tables = _tables(document, str(config))
    file = _table(str(config), document)
    _check_names(file, Settings)
    if tables and (loose := [source.spell(name) for source in of_model for name in source.values]):
        raise SettingsError(f"{loose[0]} cannot be combined with [[model]] tables; put it into the table of its model")
    values = _gather(Settings, [*of_server, file])
    root = values.get("model_repository_path")
    if root is not None and not tables and not any(source.values for source in of_model) and not config:
        repository = read_repository(root)
        tables, ignored = _repository_tables(repository), [*ignored, *repository.ignored]
    described: list[tuple[list[_Source], Mapping[str, Any]]] = [([table], inner) for table, inner in tables]
    models = [_read_model(each, inner, root, ignored) for each, inner in described or [(of_model, {})]]
    names = _check_unique_names(models)
    settings = Settings(**values, models=tuple(models), ignored=tuple(dict.fromkeys(ignored)))
    if settings.default_model and settings.default_model not in names:
        listed = ", ".join(sorted(names))
        raise SettingsError(f"default_model {settings.default_model!r} is not one of the models: {listed}")
    for name, parse in _ACCESS_OPTIONS.items():
        try:
            parse(getattr(settings, name))
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from None
    _check_listening(settings)
    if settings.default_timeout_s > settings.max_timeout_s:
        raise SettingsError(
            f"default_timeout_s {settings.default_timeout_s:g} is above max_timeout_s {settings.max_timeout_s:g}"
        )
    return settings
