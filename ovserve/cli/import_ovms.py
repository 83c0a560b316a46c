"""`ovserve import-ovms`: write the TOML that says the same as a repository of OpenVINO Model Server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ovserve.cli.arguments import ArgumentParser
from ovserve.cli.commands import ExitCode
from ovserve.errors import SettingsError
from ovserve.settings.modelserver.graph import GRAPH_FILE, read_graph
from ovserve.settings.modelserver.repository import Repository, read_config, read_repository

__all__ = ["run", "toml_of"]

_DESCRIPTION = """Read a config.json of OpenVINO Model Server, a directory with one, or a directory of models with
graphs, and print TOML for `ovserve --config` that says the same. What has no effect is printed as comments."""


def run(arguments: Sequence[str]) -> int:
    """Print the TOML; return the exit code."""
    parser = ArgumentParser("import-ovms", _DESCRIPTION)
    parser.usage = "ovserve import-ovms REPOSITORY"
    parser.add_argument("repository", type=Path, help="config.json, a directory with one, or with graphs")
    path = Path(str(parser.parse(arguments)["repository"])).absolute()
    try:
        found = _read(path)
    except SettingsError as error:
        print(f"ovserve: {error}", file=sys.stderr)
        return ExitCode.USAGE
    print("\n".join(toml_of(found)))
    return ExitCode.OK


def _read(path: Path) -> Repository:
    if path.is_file():
        return read_config(path)
    if (path / GRAPH_FILE).is_file():
        graph = read_graph(path / GRAPH_FILE)
        return Repository([(str(path), {"name": path.name, **graph.values})], list(graph.ignored))
    return read_repository(path)


def toml_of(repository: Repository) -> Iterator[str]:
    """Yield the lines of a TOML file."""
    for ignored in dict.fromkeys(repository.ignored):
        yield f"# without effect: {_comment(ignored)}"
    for where, values in repository.tables:
        yield ""
        yield f"# {_comment(where)}"
        yield "[[model]]"
        nested = {name: value for name, value in values.items() if name in ("lora", "composite")}
        for name, value in values.items():
            if name not in nested:
                yield f"{name} = {_value(value)}"
        for name, tables in nested.items():
            for table in tables:
                yield f"[[model.{name}]]"
                for key, value in table.items():
                    yield f"{key} = {_value(value)}"


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _value(value: Any) -> str:
    """Return a value in TOML's form."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(key)} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # A JSON string is a TOML string, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
