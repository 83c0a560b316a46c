"""Files of OpenVINO Model Server for tests: graphs with given options, and repositories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["graph_text", "write_repository"]


def graph_text(options: Mapping[str, Any], *, extra: str = "", queue: str = "AUTO") -> str:
    """Return a graph as the reference server's own exporter writes it."""
    lines = []
    for name, value in options.items():
        text = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" if isinstance(value, str) else repr(value)
        lines.append(f"          {name}: {text},")
    return "\n".join(
        [
            f"# OVMS_GRAPH_QUEUE_MAX_SIZE: {queue}",
            'input_stream: "HTTP_REQUEST_PAYLOAD:input"',
            'output_stream: "HTTP_RESPONSE_PAYLOAD:output"',
            "node: {",
            '  name: "ImageGenExecutor"',
            '  calculator: "ImageGenCalculator"',
            '  input_stream: "HTTP_REQUEST_PAYLOAD:input"',
            '  input_side_packet: "IMAGE_GEN_NODE_RESOURCES:pipes"',
            '  output_stream: "HTTP_RESPONSE_PAYLOAD:output"',
            "  node_options: {",
            "      [type.googleapis.com / mediapipe.ImageGenCalculatorOptions]: {",
            *lines,
            extra,
            "      }",
            "  }",
            "}",
        ]
    )


def write_repository(root: Path, graphs: Mapping[str, str]) -> Path:
    """Write a graph for each name, and a config.json that lists them; return its path."""
    for name, text in graphs.items():
        (root / name).mkdir(parents=True)
        (root / name / "graph.pbtxt").write_text(text)
    config = root / "config.json"
    entries = [{"name": name, "base_path": name} for name in graphs]
    config.write_text(json.dumps({"model_config_list": [], "mediapipe_config_list": entries}))
    return config
