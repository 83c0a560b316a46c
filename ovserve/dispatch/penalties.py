"""Delays for clients whose jobs have killed several workers in a row.

A job that kills its workers costs each of them a restart. Two deaths in a row are one such job with its retry, which
can be a mistake. From the third on, the client's next job waits, each time twice as long, so that the restarted
workers serve the other clients meanwhile. A finished job of the client ends the delay.

Thread-safe: no; the dispatcher's lock guards it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MAX_DELAY_S", "Penalties"]

FREE_DEATHS = 2  # both attempts of one job
FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0
_MAX_DOUBLINGS = 16  # beyond the maximum delay; keeps the power finite
MAX_CLIENTS = 1024  # remembered; then the one whose death is longest ago is forgotten


@dataclass(slots=True)
class _Record:
    deaths: int = 0
    until: float = 0.0  # monotonic instant before which no job of the client is dispatched


class Penalties:
    """The clients that have killed workers, with the ends of their delays.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def note_death(self, client: str) -> float:
        """Count a worker that died with jobs of this client alone; return the delay of its next job, in seconds."""
        record = self._records.setdefault(client, _Record())
        self._records.move_to_end(client)
        if len(self._records) > MAX_CLIENTS:
            self._records.popitem(last=False)
        record.deaths += 1
        doublings = record.deaths - FREE_DEATHS - 1
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(doublings, _MAX_DOUBLINGS)) if doublings >= 0 else 0.0
        record.until = self._clock() + delay_s
        return delay_s

    def note_done(self, client: str) -> None:
        """Forget the deaths of a client: one of its jobs has finished."""
        self._records.pop(client, None)

    def is_delayed(self, client: str) -> bool:
        """Return whether no job of the client may be dispatched now."""
        record = self._records.get(client)
        return record is not None and self._clock() < record.until
