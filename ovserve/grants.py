"""What a named API key may do: models, requests and pictures a minute, requests at once, until when.

A limit of N a minute means: in no 60 s are there more than N. Each grant remembers when its requests began (a sliding
window), so its memory is limited by its limits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ovserve.errors import Forbidden, RateLimited

__all__ = ["MAX_PER_MINUTE", "Grant", "KeyLimits", "Window"]

WINDOW_S = 60.0
MAX_PER_MINUTE = 100_000  # of a limit; one entry in memory for each
CONCURRENCY_RETRY_S = 1


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The limits of one key; 0 and an empty tuple mean no limit.

    Attributes:
        requests_per_minute: requests that need a key.
        pictures_per_minute: pictures asked for.
        concurrent: requests at the same time.
        models: names or aliases of the models that it may use.
    """

    requests_per_minute: int = 0
    pictures_per_minute: int = 0
    concurrent: int = 0
    models: tuple[str, ...] = ()


class Window:
    """How much was taken in the last WINDOW_S. The caller holds a lock."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, int]] = deque()
        self.used = 0

    def forget(self, now: float) -> None:
        """Drop what is older than the window."""
        while self._taken and self._taken[0][0] <= now - WINDOW_S:
            self.used -= self._taken.popleft()[1]

    def take(self, now: float, count: int) -> None:
        """Count something that begins now."""
        self._taken.append((now, count))
        self.used += count

    def wait_s(self, now: float, count: int) -> float:
        """Return the seconds until so much has left the window."""
        left = count
        for at, taken in self._taken:
            left -= taken
            if left <= 0:
                return at + WINDOW_S - now
        return 0.0


class Grant:
    """A named key: its limits and what it has used. Thread-safe: yes, one lock.

    Args:
        name: the key's name.
        limits: its limits; a reload replaces them, and what was used stays.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.limits = limits
        self._now = clock
        self._lock = threading.Lock()
        self._requests, self._pictures = Window(), Window()
        self._running = 0

    def begin(self) -> None:
        """Count a request; `end` belongs to it. Raises RateLimited: the key has no more requests now."""
        limits = self.limits
        with self._lock:
            now = self._now()
            self._requests.forget(now)
            if limits.concurrent and self._running >= limits.concurrent:
                raise RateLimited(
                    f"Key {self.name!r} has {limits.concurrent} requests in progress, its limit.",
                    retry_after_s=CONCURRENCY_RETRY_S,
                )
            limit = limits.requests_per_minute
            if limit and self._requests.used >= limit:
                wait_s = self._requests.wait_s(now, self._requests.used - limit + 1)
                raise RateLimited(
                    f"Key {self.name!r} has reached its limit of {limit} requests a minute.",
                    retry_after_s=wait_s,
                    headers=_fields("requests", limit, 0, wait_s),
                )
            if limit:
                self._requests.take(now, 1)
            self._running += 1

    def end(self) -> None:
        """End a request that `begin` has counted."""
        with self._lock:
            self._running -= 1

    def take_pictures(self, model: str, count: int, aliases: Collection[str] = ()) -> None:
        """Count pictures of a model.

        Args:
            model: the model's name.
            count: how many.
            aliases: other names of the model, which the limit may use.

        Raises:
            Forbidden: the key may not use the model, or so many pictures at once.
            RateLimited: it has no more pictures now.
        """
        limits = self.limits
        if limits.models and not {model, *aliases} & set(limits.models):
            raise Forbidden(
                f"Key {self.name!r} may not use the model {model!r}; it may use {', '.join(limits.models)}."
            )
        limit = limits.pictures_per_minute
        if not limit:
            return
        if count > limit:
            raise Forbidden(f"{count} pictures are more than key {self.name!r} may have in a minute ({limit}).")
        with self._lock:
            now = self._now()
            self._pictures.forget(now)
            if self._pictures.used + count > limit:
                wait_s = self._pictures.wait_s(now, self._pictures.used + count - limit)
                raise RateLimited(
                    f"Key {self.name!r} has reached its limit of {limit} pictures a minute.",
                    retry_after_s=wait_s,
                    headers=_fields("images", limit, limit - self._pictures.used, wait_s),
                )
            self._pictures.take(now, count)

    def fields(self) -> dict[str, str]:
        """Return the x-ratelimit-* fields of a response: what is left, and when all of it is free again."""
        limits = self.limits
        found: dict[str, str] = {}
        windows = (("requests", limits.requests_per_minute, self._requests),
                   ("images", limits.pictures_per_minute, self._pictures))  # fmt: skip
        with self._lock:
            now = self._now()
            for kind, limit, window in windows:
                if limit:
                    window.forget(now)
                    found |= _fields(kind, limit, max(0, limit - window.used), window.wait_s(now, window.used))
        return found


def _fields(kind: str, limit: int, remaining: int, reset_s: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(remaining),
        f"x-ratelimit-reset-{kind}": f"{reset_s:.3f}s",
    }
