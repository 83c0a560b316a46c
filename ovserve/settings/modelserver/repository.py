"""Repositories of the reference server: config.json, or directories with a graph each, read as `[[model]]` tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError
from ovserve.settings.modelserver.files import read_text
from ovserve.settings.modelserver.graph import GRAPH_FILE, NoImageGraph, read_graph

__all__ = ["CONFIG_FILE", "Repository", "is_json", "read_config", "read_repository"]

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 16 << 20
MAX_MODELS = 1000
_GRAPH_KEYS = {"name", "base_path", "graph_path", "subconfig"}
_MODEL_KEYS = {"name", "base_path", "target_device", "plugin_config"}
_ROOT_KEYS = {"mediapipe_config_list", "model_config_list"}


@dataclass(slots=True)
class Repository:
    """The models of a repository.

    Attributes:
        tables: options of each model, as TOML values, by where they stand.
        ignored: what has no meaning in ovserve, in words.
    """

    tables: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def is_json(content: bytes) -> bool:
    """Return whether a configuration file is a JSON object; a TOML file cannot begin like one."""
    return content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def read_config(path: Path) -> Repository:
    """Read a config.json. Raises SettingsError; the message names the file and the option."""
    text = read_text(path, MAX_CONFIG_BYTES)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: {str(error)[:200]}") from None
    if not isinstance(document, dict) or not document.keys() & _ROOT_KEYS:
        raise SettingsError(f"{path}: expected a JSON object with mediapipe_config_list or model_config_list")
    found = Repository()
    found.ignored += [f"{path}: {key[:60]!r}" for key in document if key not in _ROOT_KEYS]
    for entry, where in _entries(document, "mediapipe_config_list", path):
        _add_graph(found, entry, where, path.parent)
    for entry, where in _entries(document, "model_config_list", path):
        config = entry.get("config", entry)
        if not isinstance(config, dict):
            raise SettingsError(f"{where}: config: expected an object")
        _add_model(found, config, where, path.parent)
    if not found.tables:
        raise SettingsError(f"{path}: it names no image model" + _listed(found))
    return found


def _listed(found: Repository) -> str:
    return f" (ignored: {'; '.join(found.ignored[:5])})" if found.ignored else ""


def _entries(document: Mapping[str, Any], key: str, path: Path) -> list[tuple[dict[str, Any], str]]:
    entries = document.get(key, [])
    if not isinstance(entries, list) or len(entries) > MAX_MODELS:
        raise SettingsError(f"{path}: {key}: expected a list of at most {MAX_MODELS} objects")
    if not all(isinstance(entry, dict) for entry in entries):
        raise SettingsError(f"{path}: {key}: expected a list of objects")
    return [(entry, f"{path}: {key} {number}") for number, entry in enumerate(entries, 1)]


def _text(entry: Mapping[str, Any], key: str, where: str, default: str = "") -> str:
    value = entry.get(key, default)
    if not isinstance(value, str) or "\0" in value:
        raise SettingsError(f"{where}: {key}: expected a string")
    return value


def _add_graph(found: Repository, entry: Mapping[str, Any], where: str, folder: Path) -> None:
    """Add a graph of mediapipe_config_list."""
    name = _text(entry, "name", where)
    if not name:
        raise SettingsError(f"{where}: name is missing")
    where = f"{where} ({name[:60]})"
    found.ignored += [f"{where}: {key[:60]!r}" for key in entry if key not in _GRAPH_KEYS or key == "subconfig"]
    base = folder / _text(entry, "base_path", where, name)
    graph = base / _text(entry, "graph_path", where, GRAPH_FILE)
    try:
        read = read_graph(graph)
    except NoImageGraph as error:
        found.ignored.append(f"{where}: {error}")
        return
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    found.tables.append((where, {"name": name, **read.values}))
    found.ignored += [f"{graph}: {each}" for each in read.ignored]


def _add_model(found: Repository, config: Mapping[str, Any], where: str, folder: Path) -> None:
    """Add a model of model_config_list: a directory with a graph, or with a pipeline."""
    name, base = _text(config, "name", where), _text(config, "base_path", where)
    if not name or not base:
        raise SettingsError(f"{where}: name and base_path are needed")
    where, directory = f"{where} ({name[:60]})", folder / base
    if (directory / GRAPH_FILE).is_file():
        _add_graph(found, {"name": name, "base_path": base}, where, folder)
        found.ignored += [f"{where}: {key[:60]!r}" for key in config if key not in ("name", "base_path")]
        return
    if not (directory / "model_index.json").is_file():
        found.ignored.append(f"{where}: {directory} is no image pipeline")
        return
    values: dict[str, Any] = {"name": name, "path": str(directory)}
    if "target_device" in config:
        values["device"] = _text(config, "target_device", where)
    if "plugin_config" in config:
        plugin = config["plugin_config"]
        values["plugin_config"] = plugin if isinstance(plugin, str) else json.dumps(plugin)
    found.tables.append((where, values))
    found.ignored += [f"{where}: {key[:60]!r}" for key in config if key not in _MODEL_KEYS]


def read_repository(root: Path) -> Repository:
    """Read a directory of models: its config.json, else each directory with a graph or a pipeline, two levels deep.

    Raises:
        SettingsError: it holds no image model, or a file in it is wrong.
    """
    if (root / CONFIG_FILE).is_file():
        return read_config(root / CONFIG_FILE)
    found = Repository()
    try:
        directories = sorted(_directories(root))
    except OSError as error:
        raise SettingsError(f"{root}: {error.strerror}") from None
    for directory in directories:
        name = str(directory.relative_to(root))
        if (directory / GRAPH_FILE).is_file():
            _add_graph(found, {"name": name, "base_path": name}, str(directory), root)
        elif (directory / "model_index.json").is_file():
            found.tables.append((str(directory), {"name": name, "path": str(directory)}))
    if not found.tables:
        raise SettingsError(f"{root}: no {CONFIG_FILE}, and no directory with a {GRAPH_FILE} or a model_index.json")
    return found


def _directories(root: Path) -> list[Path]:
    """Return the directories that may hold a model, without hidden ones. Raises OSError."""
    found = []
    for entry in os.scandir(root):
        if entry.is_dir() and not entry.name.startswith("."):
            path = root / entry.name
            found.append(path)
            is_model = (path / GRAPH_FILE).exists() or (path / "model_index.json").exists()
            if not is_model:
                found += [path / each.name for each in os.scandir(path) if each.is_dir() and each.name[0] != "."]
        if len(found) > 10 * MAX_MODELS:
            raise SettingsError(f"{root}: more than {10 * MAX_MODELS} directories")
    return found
