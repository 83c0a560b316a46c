"""Where pulled repositories lie: the default directory, and the file of an adapter in it."""

from __future__ import annotations

import os
from pathlib import Path

from ovserve.errors import SettingsError

__all__ = ["adapter_file", "default_root"]


def default_root() -> Path:
    """Return the directory of pulled models if none is named: `ovserve/models` in the user's data directory."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "ovserve" / "models"


def adapter_file(root: Path, repository: str, name: str) -> Path:
    """Return the file of a pulled adapter: the named one, or the only one of its repository.

    Raises:
        SettingsError: it is not there; the message has the command that pulls it.
    """
    directory = root.joinpath(*repository.split("/"))
    try:
        found = [directory / name] if name else sorted(directory.glob("*.safetensors"))
    except OSError:
        found = []
    if len(found) == 1 and found[0].is_file():
        return found[0]
    wanted = f"{repository}@{name}" if name else repository
    problem = f"has {len(found)} adapters; choose one: {repository}@FILE" if len(found) > 1 else "is not pulled"
    raise SettingsError(f"{wanted} {problem}; `ovserve pull --lora {wanted} --model-repository-path {root}` pulls it")
