"""The state of the newest reload, as the API reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ModelReload", "ReloadStatus"]


@dataclass(frozen=True, slots=True)
class ModelReload:
    """What a reload has done to one model.

    Attributes:
        state: `loading`, `done` or `failed`.
        reason: why it failed, or "".
    """

    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ReloadStatus:
    """The newest reload.

    Attributes:
        number: 1 for the first reload since the start; 0: there was none.
        error: why the configuration was rejected as a whole, or "".
        is_reading: the configuration is being read; no worker has been started for it yet.
        models: each model's part, by name.
    """

    number: int = 0
    error: str = ""
    is_reading: bool = False
    models: Mapping[str, ModelReload] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """`none`, `loading`, `done` or `failed`. A failure of one model counts at once, while others still load."""
        if not self.number:
            return "none"
        states = {model.state for model in self.models.values()}
        if self.error or "failed" in states:
            return "failed"
        return "loading" if self.is_reading or "loading" in states else "done"

    @property
    def failure(self) -> str:
        """Why the reload failed, in one line; empty if it has not."""
        failed = [f"model {name}: {model.reason}" for name, model in self.models.items() if model.state == "failed"]
        return self.error or "; ".join(failed)

    def document(self) -> dict[str, object]:
        """Return the document of `GET /v1/config/reload/status`."""
        models = {name: {"state": model.state, "reason": model.reason} for name, model in self.models.items()}
        return {"number": self.number, "state": self.state, "error": self.failure, "models": models}
