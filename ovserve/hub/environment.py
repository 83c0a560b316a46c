"""The hub's settings in the environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, and the file of `hf auth login`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ovserve.errors import HubError
from ovserve.hub.client import DEFAULT_ENDPOINT

__all__ = ["SECRETS", "endpoint_of", "is_offline", "token_of"]

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
MAX_TOKEN_BYTES = 4096


def endpoint_of(variables: Mapping[str, str]) -> str:
    """Return the base URL of the hub."""
    return (variables.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline(variables: Mapping[str, str]) -> bool:
    """Return whether HF_HUB_OFFLINE forbids requests to the hub."""
    return variables.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def token_of(variables: Mapping[str, str]) -> str:
    """Return the token: of HF_TOKEN, else of the file that the hub's own client writes; "" without one.

    Raises:
        HubError: the file that HF_TOKEN_PATH names cannot be read.
    """
    for name in SECRETS:
        if token := variables.get(name, "").strip():
            return token
    named = variables.get("HF_TOKEN_PATH", "")
    home = variables.get("HF_HOME") or str(Path(variables.get("HOME", "~")).expanduser() / ".cache" / "huggingface")
    path = Path(named) if named else Path(home) / "token"
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_TOKEN_BYTES).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        if named:
            raise HubError(f"HF_TOKEN_PATH {path}: cannot be read: {error}") from None
        return ""
