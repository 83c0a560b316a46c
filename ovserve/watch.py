"""Watching files for changes by polling, for the option `watch`.

A change counts when it has been the same for two polls in a row: a file that is being copied changes at each.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["Watch", "state_of"]

log = logging.getLogger(__name__)


def state_of(paths: Iterable[Path]) -> str:
    """Return a text that changes when one of the files is replaced, written, added or removed."""
    states = []
    for path in paths:
        try:
            found = os.stat(path)
            states.append(f"{path}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}")
        except OSError as error:
            states.append(f"{path}:{error.errno}")
    return "\n".join(states)


class Watch:
    """A thread that calls `on_change` after changes. Thread-safe: yes.

    Args:
        read: returns a text that changes with the files.
        on_change: called in the thread after each change; must not raise.
        interval_s: time between two polls.
    """

    def __init__(self, read: Callable[[], str], on_change: Callable[[], None], interval_s: float) -> None:
        self._read = read
        self._on_change = on_change
        self._interval_s = interval_s
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start the thread; what is read now is the state without changes."""
        self._known = self._seen = self._read()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, without waiting for a change that is being applied."""
        self._is_stopping.set()

    def _run(self) -> None:
        while not self._is_stopping.wait(self._interval_s):
            self.poll()

    def poll(self) -> None:
        """Read once, and call `on_change` if there is a change that the poll before has seen too."""
        try:
            found = self._read()
        except Exception:  # a bug; the thread goes on
            log.exception("watched files could not be read")
            return
        if found == self._seen and found != self._known:
            self._known = found
            log.info("watched files have changed: reloading")
            self._on_change()
        self._seen = found
