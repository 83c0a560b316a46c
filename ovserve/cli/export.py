"""The modes `--pull` and `--configure` of the reference server: download a model, and write its graph.pbtxt."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovserve import __version__
from ovserve.cli.commands import ExitCode
from ovserve.cli.modelserver import read_command_line
from ovserve.cli.pull import parse_requests, pull_all, reporter_for
from ovserve.errors import SettingsError, StartupError
from ovserve.settings.loras import parse_source_loras
from ovserve.settings.modelserver.graph import GRAPH_FILE, write_graph
from ovserve.settings.options import ModelSettings, Settings

__all__ = ["export", "graph_options"]

_DEFAULTS = ModelSettings()
# Options of a graph that have the same name in a model's settings.
_SAME = (
    "default_resolution", "default_num_inference_steps", "max_num_inference_steps", "num_images_per_prompt",
    "guidance_scale", "max_num_images_per_prompt",
)  # fmt: skip


def graph_options(model: ModelSettings) -> dict[str, Any]:
    """Return the options of a model by their names in a graph; only those that differ from the defaults."""
    options: dict[str, Any] = {"models_path": "./"}
    if model.device != _DEFAULTS.device:
        options["device"] = model.device
    if plugin := _plugin_config(model):
        options["plugin_config"] = plugin
    if model.resolution:
        options["resolution"] = [str(size) for size in model.resolution]
    elif model.max_resolution != _DEFAULTS.max_resolution:
        options["max_resolution"] = str(model.max_resolution)
    for name in _SAME:
        value = getattr(model, name)
        if value != getattr(_DEFAULTS, name):
            options[name] = str(value) if name == "default_resolution" else value
    own = {adapter.alias: adapter.alpha for adapter in model.lora}
    if model.lora:
        options["lora_adapters"] = [
            {"alias": adapter.alias, "path": str(adapter.path), "alpha": adapter.alpha} for adapter in model.lora
        ]
    if model.composite:
        options["composite_lora_adapters"] = [
            {
                "alias": each.alias,
                "components": {name: own[name] if alpha is None else alpha for name, alpha in each.components},
            }
            for each in model.composite
        ]
    if options.get("resolution") and options.get("default_resolution") == options["resolution"][0]:
        del options["default_resolution"]
    return options


def _plugin_config(model: ModelSettings) -> str:
    """Return the properties with those that options stand for, as JSON text; a number of streams is a string there."""
    config: dict[str, Any] = json.loads(model.plugin_config) if model.plugin_config else {}
    if model.streams:
        config["NUM_STREAMS"] = str(model.streams)
    if model.cache_dir is not None:
        config["CACHE_DIR"] = str(model.cache_dir)
    return json.dumps(config, separators=(",", ":")) if config else ""


def export(mode: str, arguments: Sequence[str], parse: Callable[[Sequence[str], Mapping[str, str]], Settings]) -> int:
    """Run `--pull` or `--configure`; return the exit code.

    Args:
        mode: pull or configure.
        arguments: the command line.
        parse: returns the settings of a command line. Raises SettingsError.
    """
    try:
        if mode == "configure":
            model = parse(arguments, os.environ).models[0]
            return _write(Path(str(model.path)), model)
        line = read_command_line(arguments)
        # Adapters of the hub are looked up when the settings are read, so they are pulled before.
        loras = [each.partition("=")[2] for each in line.arguments if each.startswith("--source_loras=")]
        rest = [each for each in line.arguments if not each.startswith("--source_loras=")]
        settings = parse(rest, os.environ)
        model = settings.models[0]
        wanted = [model.source_model, f"--revision={model.revision}", *line.pull_arguments]
        if settings.model_repository_path:
            wanted.append(f"--model_repository_path={settings.model_repository_path}")
        for text in loras:
            sources, _ = parse_source_loras(text)
            wanted += [f"--lora={each.place}@{each.file}" if each.file else f"--lora={each.place}"
                       for each in sources if each.kind == "repository"]  # fmt: skip
        requests, _ = parse_requests(wanted, os.environ)
        code = pull_all(requests, reporter_for(is_json=False), os.environ)
        return code or _write(requests[0].directory, parse(line.arguments, os.environ).models[0])
    except (StartupError, OSError) as error:
        print(f"ovserve: {error}", file=sys.stderr)
        return ExitCode.USAGE


def _write(directory: Path, model: ModelSettings) -> int:
    """Write the graph of a model. Raises SettingsError and OSError."""
    try:
        text = write_graph(graph_options(model), __version__)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    temporary = directory / f".{GRAPH_FILE}.new"
    temporary.write_text(text, "utf-8")
    os.replace(temporary, directory / GRAPH_FILE)
    return ExitCode.OK
