"""A model that is not on disk yet: what `/v3/models` and the errors say of it while it is downloaded."""

from __future__ import annotations

import threading
from dataclasses import dataclass

__all__ = ["PendingModel", "PullState"]


@dataclass(frozen=True, slots=True)
class PullState:
    """The state of a download.

    Attributes:
        message: one line: what happens, or why it failed.
        percent: part of the bytes that is there, 0 to 100; None: not known yet.
        left_s: estimated time left in seconds; None: not known.
        has_failed: it has ended with an error.
    """

    message: str = "waiting to be pulled"
    percent: float | None = None
    left_s: float | None = None
    has_failed: bool = False


class PendingModel:
    """One model of a repository that is being pulled. Thread-safe: yes; the state is replaced as a whole.

    Args:
        name: value of the request field `model`.
        repository: OWNER/NAME.
        revision: branch, tag or commit.
    """

    def __init__(self, name: str, repository: str, revision: str) -> None:
        self.name = name
        self.repository = repository
        self.revision = revision
        self._lock = threading.Lock()
        self._state = PullState()

    @property
    def state(self) -> PullState:
        """The newest state."""
        with self._lock:
            return self._state

    @state.setter
    def state(self, state: PullState) -> None:
        with self._lock:
            self._state = state

    @property
    def reason(self) -> str:
        """Why the model serves no requests, one line."""
        state = self.state
        percent = "" if state.percent is None or state.has_failed else f" {state.percent:.0f} %"
        return f"{'pull failed' if state.has_failed else 'pulling'} {self.repository}{percent}: {state.message}"
