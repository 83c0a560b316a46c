"""Read a configuration file of the reference server, up to a limit."""

from __future__ import annotations

from pathlib import Path

from ovserve.errors import SettingsError

__all__ = ["read_text"]


def read_text(path: Path, limit_bytes: int) -> str:
    """Return a file's text. Raises SettingsError: it cannot be read, is too long, or is not UTF-8."""
    try:
        with path.open("rb") as stream:
            content = stream.read(limit_bytes + 1)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    if len(content) > limit_bytes:
        raise SettingsError(f"{path}: it has more than {limit_bytes} bytes")
    try:
        return content.decode("utf-8-sig")
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None
