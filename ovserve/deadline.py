"""Deadlines: absolute instants on the monotonic clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Deadline"]


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """One instant on the monotonic clock, in seconds. Thread-safe: immutable.

    Messages between processes carry durations (`remaining`), never instants: clocks differ between hosts.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the instant `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Return the seconds left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    def is_expired(self) -> bool:
        """Return whether the instant has passed."""
        return time.monotonic() >= self.at
