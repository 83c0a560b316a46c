"""The files of one worker on its node: its requests and uploads, and room for its pictures.

Ids are those of the front end's segments, so the messages between front end and worker need no change. A file exists
from the command that brings it until its job ends.

Runs in: actor. Thread-safe: no; the actor's lock guards it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict, deque
from pathlib import Path

from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.local.folder import Folder

__all__ = ["NodeFiles"]

_ID = re.compile(r"[0-9a-f]{24}")  # what a front end's spool gives; anything else could leave the folder


class NodeFiles:
    """One folder of files.

    Args:
        directory: parent of the folder; preferably a tmpfs. The folders of dead actors in it are removed first.

    Raises:
        OSError: the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._folder = Folder(directory)
        self._names: defaultdict[str, set[str]] = defaultdict(set)  # of the files, by job
        self._needs: defaultdict[tuple[str, int], deque[int]] = defaultdict(deque)  # sizes, by job and picture
        self._granted: defaultdict[tuple[str, int], deque[str]] = defaultdict(deque)  # ids, by job and picture

    @property
    def blobs(self) -> SpoolBlobs:
        """The worker's access to the files."""
        return SpoolBlobs((str(self._folder.path),))

    def add(self, job: str, storage: str, offset: int, data: bytes) -> None:
        """Write a part of an upload at its offset. What lies between the parts takes no memory. Raises OSError."""
        descriptor = self._open(job, storage)
        try:
            os.posix_fallocate(descriptor, offset, max(1, len(data)))
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def note_need(self, job: str, picture: int, size: int) -> None:
        """Record the size that a Need announces: the Grants come in the order of the Needs."""
        self._needs[job, picture].append(size)

    def make_room(self, job: str, picture: int, storage: str) -> bool:
        """Create the file that a Grant names; return False if there is no space for it."""
        needs = self._needs.get((job, picture))
        size = needs.popleft() if needs else 0
        if job not in self._names:  # the Grant of a job that has ended: the worker finds no file
            return True
        try:
            descriptor = self._open(job, storage)
            try:
                os.posix_fallocate(descriptor, 0, max(1, size))
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError:
            return False
        self._granted[job, picture].append(storage)
        return True

    def skip_room(self, job: str, picture: int) -> None:
        """Record a Grant without a storage."""
        if needs := self._needs.get((job, picture)):
            needs.popleft()

    def take(self, job: str, picture: int) -> tuple[str, bytes] | None:
        """Remove and return the picture that the worker has filled first, with the id of its storage."""
        granted = self._granted.get((job, picture))
        if not granted:
            return None
        storage = granted.popleft()
        path = self._folder.path / storage
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        self._names[job].discard(storage)
        path.unlink(missing_ok=True)
        return storage, data

    def end(self, job: str) -> None:
        """Remove the files of a job. Idempotent."""
        for name in self._names.pop(job, ()):
            with contextlib.suppress(OSError):
                os.unlink(self._folder.path / name)
        for records in (self._needs, self._granted):
            for key in [key for key in records if key[0] == job]:
                del records[key]

    def close(self) -> None:
        """Remove the folder. Idempotent."""
        self._folder.close()

    def _open(self, job: str, storage: str) -> int:
        if not _ID.fullmatch(storage):
            raise ValueError(f"not the id of a segment: {storage[:40]!r}")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._folder.path / storage, flags, 0o600)
        self._names[job].add(storage)
        return descriptor
