"""What a worker of a model takes: an estimate from its files until one has run, then what the last one took.

The measurements are kept in a file beside the compiled models, so that they survive a restart. The file is a help, not
a truth: a missing or damaged one means that estimates are made from the files of the models again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ovserve.fleet.desired import DesiredModel
from ovserve.models.weights import estimated_bytes

__all__ = ["Estimates", "Measured"]

_MAX_ENTRIES = 1000  # of the file; the oldest are dropped
_MAX_FILE_BYTES = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the last workers of a model took: peak memory of one in bytes, and seconds until the first was ready."""

    worker_bytes: int
    load_s: float


class Estimates:
    """Expected memory and load time of the models' workers. Runs in: the supervisor thread.

    Args:
        path: the file of the measurements; None: they are kept in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._measured = _read(path)
        self._guesses: dict[str, int] = {}

    def worker_bytes(self, record: DesiredModel) -> int:
        """Return the memory that one worker of this record is expected to take."""
        key = _key(record)
        if found := self._measured.get(key):
            return found.worker_bytes
        if key not in self._guesses:
            self._guesses[key] = estimated_bytes(record.profile.directory)
        return self._guesses[key]

    def load_s(self, record: DesiredModel) -> float:
        """Return how long the last load took; 0 if there was none."""
        found = self._measured.get(_key(record))
        return found.load_s if found else 0.0

    def note(self, record: DesiredModel, worker_bytes: int, load_s: float = 0.0, *, is_final: bool = False) -> None:
        """Record a measurement.

        Args:
            record: the record that the worker was started for.
            worker_bytes: its peak memory so far.
            load_s: how long it loaded; 0: keep what is known.
            is_final: the worker has ended after it had done jobs: its peak replaces a higher one of an earlier worker.
        """
        key = _key(record)
        old = self._measured.pop(key, None)  # and back in at the end: the order is that of use
        if old is not None and not is_final:
            worker_bytes = max(worker_bytes, old.worker_bytes)
        self._measured[key] = Measured(worker_bytes, load_s or (old.load_s if old else 0.0))
        while len(self._measured) > _MAX_ENTRIES:
            del self._measured[next(iter(self._measured))]

    def write(self) -> None:
        """Write the file. Without it, the next start estimates again."""
        if self._path is None:
            return
        document = {key: [found.worker_bytes, round(found.load_s, 3)] for key, found in self._measured.items()}
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
            try:
                fresh.write_text(json.dumps(document), "ascii")
                fresh.replace(self._path)
            except OSError:
                with contextlib.suppress(OSError):
                    fresh.unlink()
                raise
        except OSError as error:
            log.warning("measured memory not stored, so the next start estimates again: %s", error)


def _key(record: DesiredModel) -> str:
    """Return a key for everything that changes what a worker takes."""
    model = record.model_of_workers
    subject = (str(record.profile.directory), record.files, model.device, model.engine, model.plugin_config)
    text = repr((subject, model.threads, model.streams, model.vae_tile_px, _library_version()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def _library_version() -> str:
    """Return the version of openvino, read once: reading parses a file, and the supervisor asks in each turn."""
    try:
        return version("openvino")
    except PackageNotFoundError:  # installed as files only
        return ""


def _read(path: Path | None) -> dict[str, Measured]:
    if path is None:
        return {}
    try:
        with path.open("rb") as stream:
            document = json.loads(stream.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, Measured] = {}
    for key, value in document.items() if isinstance(document, dict) else ():
        with contextlib.suppress(TypeError, ValueError, OverflowError, LookupError):
            worker_bytes, load_s = int(value[0]), float(value[1])
            if 0 < worker_bytes < 1 << 50 and math.isfinite(load_s) and load_s >= 0:
                found[key] = Measured(worker_bytes, load_s)
    return found
