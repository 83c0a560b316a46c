"""Reads the configuration files of a model's components."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovserve.errors import ModelError

__all__ = ["component_config", "number"]


def component_config(directory: Path) -> dict[str, Any]:
    """Read the JSON object in `directory`/config.json.

    Raises:
        ModelError: the file cannot be read or holds no JSON object.
    """
    path = directory / "config.json"
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return document


def number(document: Mapping[str, Any], key: str, default: float) -> float:
    """Return the number under `key`; the default if it is absent or null."""
    value = document.get(key)
    return default if value is None else float(value)
