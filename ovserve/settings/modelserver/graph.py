"""graph.pbtxt of the reference server: the options of its image node, as values of a `[[model]]` table, and back.

The rules of the reference server hold here: which options exclude each other, and what an NPU needs. What has no
meaning in ovserve is returned by name, so that the log can say so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError
from ovserve.settings.modelserver.files import read_text
from ovserve.settings.modelserver.textproto import Message, Scalar, parse, quoted

__all__ = ["GRAPH_FILE", "GraphModel", "NoImageGraph", "check_rules", "read_graph", "write_graph"]

GRAPH_FILE = "graph.pbtxt"
MAX_GRAPH_BYTES = 1 << 20
_CALCULATOR = "ImageGenCalculator"
_OPTIONS_TYPE = "ImageGenCalculatorOptions"
_SIZE = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
_QUEUE = re.compile(r"^\s*#\s*OVMS_GRAPH_QUEUE_MAX_SIZE\s*:\s*(.*?)\s*$", re.MULTILINE)
_ALIAS = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MODES = ("DYNAMIC", "STATIC", "FUSE")
_DEFAULT_MAX = "4096x4096"


class NoImageGraph(SettingsError):
    """A graph makes no images, but text or something else."""


@dataclass(frozen=True, slots=True)
class GraphModel:
    """One graph as a model.

    Attributes:
        values: options of a `[[model]]` table, as TOML values.
        ignored: what has no meaning in ovserve, in words.
    """

    values: dict[str, Any]
    ignored: tuple[str, ...] = ()


def read_graph(path: Path) -> GraphModel:
    """Read a graph file. Raises SettingsError; the message names the file and the option."""
    text = read_text(path, MAX_GRAPH_BYTES)
    try:
        return _parse_graph(text, path.parent)
    except NoImageGraph as error:
        raise NoImageGraph(f"{path}: {error}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None


def _parse_graph(text: str, folder: Path) -> GraphModel:
    """Parse the text of a graph file; paths are relative to `folder`. Raises ValueError."""
    ignored = []
    for queue in _QUEUE.findall(text):
        if queue != "AUTO" and not re.fullmatch(r"[0-9]{1,6}", queue):
            raise ValueError(f"OVMS_GRAPH_QUEUE_MAX_SIZE is {queue[:40]!r}; expected AUTO or a number")
        ignored.append("OVMS_GRAPH_QUEUE_MAX_SIZE: requests share the calls of a worker")
    graph = parse(text)
    nodes = [node for node in graph.messages("node") if _text_of(node, "calculator") == _CALCULATOR]
    if not nodes:
        raise NoImageGraph(f"it has no node with calculator {_CALCULATOR!r}, so it makes no images")
    if len(nodes) != 1:
        raise ValueError(f"it has {len(nodes)} nodes with calculator {_CALCULATOR!r}; expected one")
    others = [_text_of(node, "calculator") for node in graph.messages("node") if node is not nodes[0]]
    ignored += [f"node {name[:60]!r}" for name in others]
    node = nodes[0]
    if not _text_of(node, "name"):
        raise ValueError(f"line {node.line}: the node has no name")
    options = [
        inner
        for holder in node.messages("node_options")
        for name, inner in holder.fields
        if isinstance(inner, Message) and name.rstrip("]").endswith(_OPTIONS_TYPE)
    ]
    if len(options) != 1:
        raise ValueError(f"line {node.line}: the node has {len(options)} node_options of {_OPTIONS_TYPE}; expected one")
    found = _read_options(options[0], folder)
    check_rules(found)
    return GraphModel(_to_table(found, ignored), tuple(ignored))


def _text_of(message: Message, name: str) -> str:
    values = message.all(name)
    return values[-1].text if values and isinstance(values[-1], Scalar) else ""


# --- options of the node ----------------------------------------------------------------------------------------------


def _string(value: Scalar) -> str:
    if not value.is_string or "\0" in value.text:
        raise ValueError("expected a quoted string")
    return value.text


def _integer(value: Scalar) -> int:
    text = "" if value.is_string else value.text
    try:
        return int(text, 0) if text[:2].lower() == "0x" else int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _unsigned(value: Scalar) -> int:
    number = _integer(value)
    if not 0 <= number < 2**64:
        raise ValueError("expected a whole number, 0 or more")
    return number


def _float(value: Scalar) -> float:
    try:
        number = float(value.text.rstrip("fF") if not value.is_string else "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _size(value: Scalar) -> str:
    text = _string(value)
    if not _SIZE.fullmatch(text):
        raise ValueError("expected WxH in pixels, such as 512x512")
    return text


def _sizes(value: Scalar) -> list[str]:
    found = _string(value).split()
    for size in found:
        if not _SIZE.fullmatch(size):
            raise ValueError(f"{size[:40]!r}: expected WxH in pixels, such as 512x512")
    if len(set(found)) < len(found):
        raise ValueError("a size is listed twice")
    if not found:
        raise ValueError("expected at least one size")
    return found


_READERS: Mapping[str, Callable[[Scalar], Any]] = {
    "models_path": _string,
    "device": _string,
    "plugin_config": _string,
    "max_resolution": _size,
    "default_resolution": _size,
    "max_num_images_per_prompt": _unsigned,
    "default_num_inference_steps": _unsigned,
    "max_num_inference_steps": _unsigned,
    "resolution": _sizes,
    "num_images_per_prompt": _integer,
    "guidance_scale": _float,
}


def _read_options(message: Message, folder: Path) -> dict[str, Any]:
    """Return the options by their names in the graph; adapters and composites as lists of tables. Raises ValueError."""
    found: dict[str, Any] = {}
    for name, value in message.fields:
        if name in ("lora_adapters", "composite_lora_adapters"):
            if not isinstance(value, Message):
                raise ValueError(f"line {value.line}: {name}: expected a message")
            found.setdefault(name, []).append(_read_message(name, value, folder))
            continue
        reader = _READERS.get(name)
        if reader is None or not isinstance(value, Scalar):
            raise ValueError(f"line {value.line}: unknown option {name[:60]!r}")
        if name in found:
            raise ValueError(f"line {value.line}: {name} is given twice")
        try:
            found[name] = reader(value)
        except ValueError as error:
            raise ValueError(f"line {value.line}: {name}={value.text[:60]!r}: {error}") from None
    if not found.get("models_path"):
        raise ValueError("models_path is missing")
    directory = folder / found["models_path"]
    if not directory.is_dir():
        raise ValueError(f"models_path={found['models_path'][:200]!r}: no such directory")
    found["models_path"] = str(directory)
    return found


def _read_message(name: str, message: Message, folder: Path) -> dict[str, Any]:
    """Return one adapter or composite as a table. Raises ValueError."""
    known = {key: value for key, value in message.fields if isinstance(value, Scalar)}
    expected = {"alias", "path", "alpha", "mode"} if name == "lora_adapters" else {"alias", "components"}
    for key, value in message.fields:
        if key not in expected:
            raise ValueError(f"line {value.line}: {name}: unknown option {key[:60]!r}")
    alias = known["alias"].text if "alias" in known else ""
    if not _ALIAS.fullmatch(alias):
        raise ValueError(f"line {message.line}: {name}: alias {alias[:60]!r}: expected letters, digits and ._-")
    if name == "lora_adapters":
        if "path" not in known:
            raise ValueError(f"line {message.line}: {name} {alias}: path is missing")
        mode = known["mode"].text if "mode" in known else "DYNAMIC"
        if mode not in _MODES:
            raise ValueError(f"line {message.line}: {name} {alias}: mode {mode[:40]!r}: one of {', '.join(_MODES)}")
        alpha = _float(known["alpha"]) if "alpha" in known else 1.0
        return {"alias": alias, "path": str(folder / _string(known["path"])), "alpha": alpha, "mode": mode}
    components = {}
    for component in message.messages("components"):
        entries = {key: value for key, value in component.fields if isinstance(value, Scalar)}
        adapter = entries["adapter_alias"].text if "adapter_alias" in entries else ""
        if not adapter or adapter in components:
            raise ValueError(f"line {component.line}: {name} {alias}: adapter_alias is missing or given twice")
        components[adapter] = _float(entries["alpha"]) if "alpha" in entries else 1.0
    if not components:
        raise ValueError(f"line {message.line}: {name} {alias}: it has no components")
    return {"alias": alias, "components": components}


# --- rules ------------------------------------------------------------------------------------------------------------


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return int(width), int(height)


def check_rules(options: Mapping[str, Any]) -> None:
    """Check options, by their names in a graph, against each other. Raises ValueError; the message names them."""
    allowed: Sequence[str] = options.get("resolution") or ()
    device = str(options.get("device") or "").split()
    if device and len(device) not in (1, 3):
        raise ValueError(f"device={options['device'][:60]!r}: expected one device, or three")
    if allowed and options.get("max_resolution"):
        raise ValueError("max_resolution cannot be combined with resolution, which lists the sizes")
    for name in ("num_images_per_prompt", "guidance_scale"):
        if options.get(name) is not None and len(allowed) != 1:
            raise ValueError(f"{name} needs exactly one resolution; {len(allowed)} are given")
    if len(allowed) == 1 and options.get("max_num_images_per_prompt") is not None:
        raise ValueError("max_num_images_per_prompt cannot be combined with one resolution; use num_images_per_prompt")
    if any("NPU" in name for name in device) and len(allowed) != 1:
        raise ValueError(f"device={options['device'][:60]!r} needs exactly one resolution; {len(allowed)} are given")
    default = options.get("default_resolution")
    if default and allowed and default not in allowed:
        raise ValueError(f"default_resolution {default} is not in resolution: {' '.join(allowed)}")
    if default and not allowed:
        largest = options.get("max_resolution") or _DEFAULT_MAX
        if any(side > limit for side, limit in zip(_sides(default), _sides(largest), strict=True)):
            raise ValueError(f"default_resolution {default} is above max_resolution {largest}")
    adapters = {entry["alias"] for entry in options.get("lora_adapters") or ()}
    if len(adapters) < len(options.get("lora_adapters") or ()):
        raise ValueError("lora_adapters: an alias is given twice")
    for composite in options.get("composite_lora_adapters") or ():
        for adapter in composite["components"]:
            if adapter not in adapters:
                raise ValueError(f"composite_lora_adapters {composite['alias']}: {adapter[:60]!r} is no adapter")
    config = options.get("plugin_config")
    if config:
        try:
            is_object = isinstance(json.loads(config), dict)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"plugin_config: {str(error)[:200]}") from None
        if not is_object:
            raise ValueError("plugin_config: expected a JSON object")


_RENAMED = {"models_path": "path"}


def _to_table(options: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """Return the options as values of a `[[model]]` table; adds what has no meaning to `ignored`."""
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name == "lora_adapters":
            if fixed := sorted({entry["mode"] for entry in value} - {"DYNAMIC"}):
                ignored.append(f"lora_adapters: mode {', '.join(fixed)}: adapters are always dynamic")
            values["lora"] = [{key: entry[key] for key in ("alias", "path", "alpha")} for entry in value]
        elif name == "composite_lora_adapters":
            values["composite"] = value
        elif name == "plugin_config":
            config = json.loads(value) if value else {}
            if directory := config.pop("CACHE_DIR", None):
                values["cache_dir"] = str(directory)
            if config:
                values["plugin_config"] = json.dumps(config)
        else:
            values[_RENAMED.get(name, name)] = value
    return values


# --- writing ----------------------------------------------------------------------------------------------------------


def write_graph(options: Mapping[str, Any], version: str) -> str:
    """Return a graph file with these options, named as in a graph. Raises ValueError if they contradict."""
    check_rules(options)
    lines = []
    for name in ("models_path", *(each for each in _READERS if each != "models_path")):
        value = options.get(name)
        if value is None or value == "":
            continue
        if name == "resolution":
            value = " ".join(value)
        lines.append(f"{name}: {quoted(value) if isinstance(value, str) else f'{value:g}'}")
    for adapter in options.get("lora_adapters") or ():
        weight = "" if adapter.get("alpha", 1.0) == 1.0 else f" alpha: {adapter['alpha']:g}"
        lines.append(
            f"lora_adapters {{ alias: {quoted(adapter['alias'])} path: {quoted(adapter['path'])}{weight} "
            f"mode: {adapter.get('mode', 'DYNAMIC')} }}"
        )
    for composite in options.get("composite_lora_adapters") or ():
        parts = " ".join(
            f"components {{ adapter_alias: {quoted(alias)}{'' if alpha == 1.0 else f' alpha: {alpha:g}'} }}"
            for alias, alpha in composite["components"].items()
        )
        lines.append(f"composite_lora_adapters {{ alias: {quoted(composite['alias'])} {parts} }}")
    body = "\n".join(f"          {line}" for line in lines)
    return f"""# Written by ovserve {version}
# OVMS_GRAPH_QUEUE_MAX_SIZE: AUTO
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {{
  name: "ImageGenExecutor"
  calculator: "{_CALCULATOR}"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "IMAGE_GEN_NODE_RESOURCES:pipes"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  node_options: {{
      [type.googleapis.com / mediapipe.{_OPTIONS_TYPE}]: {{
{body}
      }}
  }}
}}
"""
