"""Repositories on disk: where each one lies, the record of what was pulled, and the lock of a pull.

ROOT/OWNER/NAME/                     the files of one commit, complete
ROOT/OWNER/NAME/.ovserve-pull.json   which repository, revision and commit; size of each file
ROOT/OWNER/.NAME.pull/               files of a pull in progress, finished ones and parts
ROOT/OWNER/.NAME.lock                locked during a pull
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ovserve.errors import HubError
from ovserve.hub.transfer import Stopped
from ovserve.models.plans import PLAN_FILE

__all__ = ["RECORD", "Place", "PullRecord", "is_complete", "locked", "put_in_place", "read_record"]

RECORD = ".ovserve-pull.json"
KEPT_FILES = ("graph.pbtxt", PLAN_FILE)  # written beside a pulled model, and not part of its repository
LOCK_POLL_S = 0.2
LOCK_STALL_S = 900.0  # without any change of a pull's files: a conversion may write nothing for minutes
_MAX_RECORD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PullRecord:
    """What a directory was made from.

    Attributes:
        repository, revision: as they were asked for.
        commit: what the revision was at that time.
        weight_format: of a conversion; "": none was made.
        files: size of each file by its path.
    """

    repository: str
    revision: str
    commit: str
    weight_format: str = ""
    files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """The paths of one repository below a root directory."""

    root: Path
    repository: str

    @property
    def directory(self) -> Path:
        """The complete files."""
        return self.root.joinpath(*self.repository.split("/"))

    def _beside(self, suffix: str) -> Path:
        return self.directory.with_name(f".{self.directory.name}.{suffix}")

    @property
    def staging(self) -> Path:
        """Files of a pull in progress."""
        return self._beside("pull")

    @property
    def converted(self) -> Path:
        """Result of a conversion in progress."""
        return self._beside("converted")

    @property
    def lock(self) -> Path:
        """File that is locked during a pull."""
        return self._beside("lock")

    @property
    def old(self) -> Path:
        """What was replaced, until it is deleted."""
        return self._beside("old")


def read_record(directory: Path) -> PullRecord | None:
    """Return the record of a directory; None if it was not made by a pull, or the record cannot be read."""
    try:
        with (directory / RECORD).open("rb") as stream:
            document = json.loads(stream.read(_MAX_RECORD_BYTES))
        found = PullRecord(**document)
        sizes = {str(path): int(size) for path, size in found.files.items()}
        return PullRecord(
            str(found.repository), str(found.revision), str(found.commit), str(found.weight_format), sizes
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def is_complete(directory: Path, record: PullRecord) -> bool:
    """Return whether every file of the record is there with its size."""
    for path, size in record.files.items():
        try:
            info = os.stat(directory / path)
        except OSError:
            return False
        if not stat.S_ISREG(info.st_mode) or info.st_size != size:
            return False
    return bool(record.files)


def put_in_place(source: Path, place: Place, record: PullRecord) -> None:
    """Write the record into `source`, and make it the directory of its repository. Raises OSError.

    A server that has the old files open or mapped keeps them.
    """
    temporary = source / f"{RECORD}.new"
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
    os.replace(temporary, source / RECORD)
    for name in KEPT_FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(place.directory / name, source / name)
    shutil.rmtree(place.old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(place.directory, place.old)
    os.rename(source, place.directory)
    shutil.rmtree(place.old, ignore_errors=True)


@contextlib.contextmanager
def locked(place: Place, stop: threading.Event, note_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a repository. Wait for another pull of it as long as that one makes progress.

    Raises:
        HubError: the other pull has changed no file for LOCK_STALL_S.
        OSError: the directory cannot be written.
        Stopped: `stop` was set.
    """
    place.lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        seen, changed_at, has_noted = (-1, -1), time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if not has_noted:
                has_noted = True
                note_wait()
            now = _extent(place.staging)
            if now != seen:
                seen, changed_at = now, time.monotonic()
            elif time.monotonic() - changed_at > LOCK_STALL_S:
                raise HubError(
                    f"{place.repository}: another pull holds {place.lock} and has changed nothing for "
                    f"{LOCK_STALL_S:g} s",
                    is_transient=True,
                )
            if stop.wait(LOCK_POLL_S):
                raise Stopped
        yield
    finally:
        os.close(descriptor)


def _extent(directory: Path) -> tuple[int, int]:
    """Return the number of files below a directory, and their size."""
    sizes = []
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(folder, name), follow_symlinks=False).st_size)
    return len(sizes), sum(sizes)
