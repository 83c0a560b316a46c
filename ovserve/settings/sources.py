"""Read the settings from flags, the environment and a TOML file; check them by the tables of options.

Precedence: flag, environment, file, default. An empty environment variable counts as unset.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError
from ovserve.settings.access import parse_hosts, parse_listen, parse_networks, parse_origins
from ovserve.settings.checks import check_listening, check_model, check_static, check_unique_names
from ovserve.settings.loras import LoraSettings, parse_composites, parse_loras, parse_source_loras
from ovserve.settings.modelserver.graph import GRAPH_FILE, read_graph
from ovserve.settings.modelserver.repository import Repository, is_json, read_config, read_repository
from ovserve.settings.options import (
    BUILTIN_NAMES,
    BUILTIN_PREFIX,
    DEFAULT_NAME,
    ModelSettings,
    Settings,
    options_of,
)
from ovserve.settings.repositories import adapter_file, default_root
from ovserve.settings.values import SHOWN_CHARS, check_bounds, parse_text, parse_toml, shortened

__all__ = ["ENVIRONMENT_PREFIX", "load_settings", "service_variables"]

ENVIRONMENT_PREFIX = "OVSERVE_"
CLIENT_VARIABLES = frozenset({"OVSERVE_URL", "OVSERVE_PICTURES"})  # of the commands that use a server; no options
_FLAG = re.compile(r"[a-z][a-z0-9_]*")
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
    return _Source(title, values, parse_toml, lambda name: f"{title}: {name}")


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
                check_bounds(value, option, entry.default)
            except ValueError as error:
                not_numeric = "invalid literal" in str(error) or "could not" in str(error)
                problem = "not a number" if not_numeric else str(error)
                shown = shortened(raw) if entry.repr else "(hidden)"
                raise SettingsError(f"{source.spell(keys[0])}={shown}: {problem}") from None
            found[name] = value
            break
    return found


def _names(table: type) -> set[str]:
    """Return all names of all options of a table."""
    return {key for name, (_, option) in options_of(table).items() for key in (name, *option.aliases)}


def _check_names(source: _Source, *tables: type) -> None:
    known = set().union(*map(_names, tables))
    for name in source.values:
        if name not in known:
            raise SettingsError(f"{source.title}: unknown option {name[:SHOWN_CHARS]!r}{_hint(name, known)}")


def _hint(name: str, known: set[str]) -> str:
    """Return the likely correction of an unknown option name, or an empty string."""
    if name in _names(ModelSettings):
        return ": it is an option of a model; put it into a [[model]] table"
    if name in _names(Settings):
        return ": it is an option of the server; put it before the first [[model]] table"
    near = difflib.get_close_matches(name[:SHOWN_CHARS], known, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _model_name(model: ModelSettings) -> ModelSettings:
    """Return the settings with a name: the given one, else that of the built-in model or of the directory."""
    if model.name:
        return model
    if model.source_model:
        return dataclasses.replace(model, name=model.source_model)
    if model.path is None or str(model.path).startswith(BUILTIN_PREFIX):
        return dataclasses.replace(model, name=BUILTIN_NAMES.get(model.builtin_name, DEFAULT_NAME))
    try:
        name = Path(os.path.realpath(model.path)).name or "model"
    except OSError as error:  # a relative path, and the working directory is gone
        raise SettingsError(f"model path {model.path}: {error.strerror}") from None
    return dataclasses.replace(model, name=name)


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
        found.append(_split_table(f"{title}: [[model]] {number}{f' ({shortened(name)})' if name else ''}", table))
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
    return shortened(" ".join(map(str, value)) if isinstance(value, tuple) else value)


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
    foreign = {f"{ENVIRONMENT_PREFIX}CONFIG", *CLIENT_VARIABLES, *service_variables(environment)}
    own = {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in foreign
    }
    if stray := [key for key in own if not _FLAG.fullmatch(key)]:
        raise SettingsError(f"environment: unknown option {ENVIRONMENT_PREFIX}{stray[0].upper()}")
    if root := environment.get("OVMS_MODEL_REPOSITORY_PATH"):
        own.setdefault("model_repository_path", root)
    source = _Source("environment", own, parse_text, lambda name: f"{ENVIRONMENT_PREFIX}{name.upper()}")
    _check_names(source, Settings, ModelSettings)
    return dataclasses.replace(source, values={key: value for key, value in own.items() if value})


def _with_pools(settings: Settings) -> Settings:
    """Return the settings with the default pool for models that name none, unless it is this machine."""
    if settings.default_pool == "local":
        return settings
    models = (dataclasses.replace(model, pool=model.pool or settings.default_pool) for model in settings.models)
    return dataclasses.replace(settings, models=tuple(models))


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
    model = check_static(_model_name(ModelSettings(**given, **inner)), given)
    model = _with_source_loras(model, root or default_root())
    check_model(model)
    return model


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """Return the settings from flags (`{"max_body_bytes": "1000"}`), the environment and a TOML file.

    Options of a model given as flags or in the environment describe the only model. With `[[model]]` tables in the file
    they
    are an error: it would be unclear which model they describe.

    Raises:
        SettingsError: an unknown option, a wrong value, or contradictory options.
    """
    sources = (_Source("flag", flags, parse_text, "--{}".format), _from_environment(environment))
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
    names = check_unique_names(models)
    settings = Settings(**values, models=tuple(models), ignored=tuple(dict.fromkeys(ignored)))
    if settings.default_model and settings.default_model not in names:
        listed = ", ".join(sorted(names))
        raise SettingsError(f"default_model {settings.default_model!r} is not one of the models: {listed}")
    for name, parse in _ACCESS_OPTIONS.items():
        try:
            parse(getattr(settings, name))
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from None
    check_listening(settings)
    settings = _with_pools(settings)
    if settings.default_timeout_s > settings.max_timeout_s:
        raise SettingsError(
            f"default_timeout_s {settings.default_timeout_s:g} is above max_timeout_s {settings.max_timeout_s:g}"
        )
    return settings
