"""What a pull reports: bytes so far, rate and time left; shown as a bar, as JSON lines, or by one line at its end."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

__all__ = ["BarReporter", "Event", "JsonReporter", "Meter", "QuietReporter", "Reporter", "Snapshot", "shown_bytes"]

INTERVAL_S = 0.5  # between two reports of progress
_WINDOW_S = 10.0  # over which the rate is measured
_BAR_CHARS = 24


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the download at one moment.

    Attributes:
        done_bytes, total_bytes: of all files.
        rate: bytes per second over the last seconds; 0: not known yet.
        file: the path of a file in progress, or "".
        files: number of files in progress.
    """

    done_bytes: int
    total_bytes: int
    rate: float
    file: str
    files: int

    @property
    def percent(self) -> float:
        """Part of the bytes that is done, 0 to 100."""
        return 100.0 * self.done_bytes / self.total_bytes if self.total_bytes else 100.0

    @property
    def left_s(self) -> float | None:
        """Estimated time left in seconds; None: not known."""
        return (self.total_bytes - self.done_bytes) / self.rate if self.rate else None


class Meter:
    """Counts the bytes of all files. Thread-safe: yes, one lock."""

    def __init__(self, total_bytes: int, done_bytes: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total_bytes
        self._done = done_bytes
        self._clock = clock
        self._received = 0  # without what was on disk before
        self._lock = threading.Lock()
        self._active: dict[str, None] = {}
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def begin(self, file: str) -> None:
        """Note that a file's transfer begins."""
        with self._lock:
            self._active[file] = None

    def end(self, file: str) -> None:
        """Note that a file's transfer has ended."""
        with self._lock:
            self._active.pop(file, None)

    def add(self, count: int) -> None:
        """Count received bytes."""
        with self._lock:
            self._done += count
            self._received += count

    def take_back(self, count: int) -> None:
        """Count bytes as missing again: the part of a file on disk cannot be used."""
        with self._lock:
            self._done -= count

    def snapshot(self) -> Snapshot:
        """Return the current state."""
        with self._lock:
            now = self._clock()
            self._samples.append((now, self._received))
            while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_S:
                self._samples.popleft()
            then, before = self._samples[0]
            rate = (self._received - before) / (now - then) if now > then else 0.0
            return Snapshot(self._done, self._total, rate, next(iter(self._active), ""), len(self._active))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that begins or ends.

    Attributes:
        name: note, wait, plan, environment, convert, working, done or error.
        text: one line for a person.
        values: the same for a program.
    """

    name: str
    text: str
    values: Mapping[str, Any]


class Reporter:
    """Receives what a pull reports; this one discards it. Called from one thread at a time."""

    def progress(self, snapshot: Snapshot) -> None:
        """Report the state of a download."""

    def show(self, event: Event) -> None:
        """Report an event."""

    def event(self, name: str, text: str, **values: Any) -> None:
        """Report an event by its attributes."""
        self.show(Event(name, text, values))


class QuietReporter(Reporter):
    """Writes one line for each event, and nothing between: for pipes and logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def show(self, event: Event) -> None:
        """Write the line."""
        print(event.text, file=self._stream, flush=True)


class BarReporter(QuietReporter):
    """Draws a progress bar on a terminal: all bytes, the file in progress, rate and time left."""

    def progress(self, snapshot: Snapshot) -> None:
        """Draw the bar again."""
        filled = int(snapshot.percent / 100 * _BAR_CHARS)
        more = f" and {snapshot.files - 1} more" if snapshot.files > 1 else ""
        left = "" if snapshot.left_s is None else f"  {_shown_time(snapshot.left_s)} left"
        line = (
            f"[{'#' * filled}{'.' * (_BAR_CHARS - filled)}] {snapshot.percent:3.0f} %  "
            f"{shown_bytes(snapshot.done_bytes)} of {shown_bytes(snapshot.total_bytes)}  "
            f"{shown_bytes(int(snapshot.rate))}/s{left}  {snapshot.file}{more}"
        )
        self._stream.write(f"\r\x1b[K{line[:160]}")
        self._stream.flush()

    def show(self, event: Event) -> None:
        """Replace the bar by the line."""
        self._stream.write("\r\x1b[K")
        super().show(event)


class JsonReporter(Reporter):
    """Writes each event as one JSON object on a line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def progress(self, snapshot: Snapshot) -> None:
        """Write a `progress` event."""
        self._write(
            {
                "event": "progress",
                "done_bytes": snapshot.done_bytes,
                "total_bytes": snapshot.total_bytes,
                "percent": round(snapshot.percent, 1),
                "bytes_per_s": round(snapshot.rate),
                "left_s": None if snapshot.left_s is None else round(snapshot.left_s, 1),
                "file": snapshot.file,
            }
        )

    def show(self, event: Event) -> None:
        """Write an event with its values; `message` is the line for a person."""
        self._write({"event": event.name, "message": event.text, **event.values})

    def _write(self, entry: dict[str, Any]) -> None:
        print(json.dumps(entry), file=self._stream, flush=True)


def shown_bytes(count: int) -> str:
    """Return a number of bytes with three digits and a decimal unit."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 99.5 or units[0] == "B" else f"{value:.1f} {units[0]}"


def _shown_time(seconds: float) -> str:
    whole = min(int(seconds), 359_999)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
