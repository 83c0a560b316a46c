"""Absolute monotonic instants by which something must have happened."""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Deadline"]


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """One instant on the monotonic clock, in seconds. Thread-safe: immutable.

    Between processes travel durations (`remaining`), never instants, so that a message means the same on another host.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The instant `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    def is_expired(self) -> bool:
        """Whether the instant has passed."""
        return time.monotonic() >= self.at
