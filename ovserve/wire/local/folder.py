"""A front end's own folder in a spool directory: made, held by a lock, made anew when it vanishes, swept when its front end is dead.

The folder is held by an flock for as long as the process lives: the lock, not a pid (containers reuse those), tells a living
front end's folder from a dead one's, which the next `Folder` in the same directory removes.

What is not ours to hold may take the folder away all the same: systemd-logind when its user's last session ends (logind.conf(5),
RemoveIPC), a cleaner of temporary files. The next file then finds it gone, and it is made again under the same name. What was in
it is lost to those requests that are under way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ovserve.errors import ApiError, SpoolFull, SpoolUnusable
from ovserve.logs import fields

__all__ = ["FULL_RETRY_S", "NO_DESCRIPTORS", "NO_ROOM", "Folder", "sweep"]

PREFIX = "ovserve-spool-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)  # each segment holds one, and a mapped one two, until its exchange ends
FULL_RETRY_S = 2  # segments live for as long as one exchange
_UNUSABLE_RETRY_S = 10  # somebody has to mend it
_UNBORN_S = 60.0  # from a folder to its lock, many times over

log = logging.getLogger(__name__)


class Folder:
    """One folder with its lock. Thread-safe: yes, one lock.

    Args:
        directory: where it is made, after the folders of dead front ends in it were removed.
        on_loss: called when it has vanished and was made anew, under the same name and empty.
    """

    def __init__(self, directory: Path, on_loss: Callable[[], None] | None = None) -> None:
        """Raises OSError when the directory cannot be used."""
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        self._on_loss = on_loss
        self._guard = _take_lock(self.path)
        self._trouble = ""
        self._lock = threading.Lock()

    @property
    def trouble(self) -> str:
        """Why no file can be made here, tried again when it could not be; empty where nothing is known to be wrong."""
        if self._trouble:
            with contextlib.suppress(ApiError, OSError):
                path, descriptor = self.create()
                os.close(descriptor)
                os.unlink(path)
        return self._trouble

    def create(self) -> tuple[str, int]:
        """A new file, open for reading and writing: path and descriptor. Raises SpoolFull and SpoolUnusable."""
        try:
            try:
                made = self._open_new()
            except FileNotFoundError:
                self._make_anew()
                made = self._open_new()
        except OSError as error:
            is_full = error.errno in NO_ROOM and self._is_there()
            if is_full:
                self._trouble = ""
            if is_full or error.errno in NO_DESCRIPTORS:
                raise SpoolFull(
                    "the spool directory has no room for one more file", retry_after_s=FULL_RETRY_S
                ) from None
            if not self._trouble:
                log.error("the spool is unusable", extra=fields(folder=self.path, why=error.strerror))  # noqa: TRY400
            self._trouble = f"the spool directory cannot be used: {error.strerror}"
            raise SpoolUnusable(self._trouble, retry_after_s=_UNUSABLE_RETRY_S) from None
        self._trouble = ""
        return made

    def close(self) -> None:
        """Remove the folder with all that is in it. Safe to call twice."""
        with self._lock:
            guard, self._guard = self._guard, -1
        if guard >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(guard)

    def _open_new(self) -> tuple[str, int]:
        path = f"{self.path}/{secrets.token_hex(12)}"
        return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path / "lock"), os.fstat(self._guard))
        except OSError:
            return False

    def _make_anew(self) -> None:
        """Make the folder under its old name, which is what workers are told. Raises OSError."""
        with self._lock:
            if self._guard < 0:
                raise FileNotFoundError(errno.ENOENT, "the server goes down")
            if self._is_there():
                return  # another thread was first
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(0o700)  # refused where somebody else has taken the name: what lies there is not ours
            try:
                guard = _take_lock(self.path)
            except OSError:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
                raise
            os.close(self._guard)
            self._guard = guard
        log.warning("the spool folder had vanished, and was made anew", extra=fields(folder=self.path))
        if self._on_loss:
            self._on_loss()


def _take_lock(folder: Path) -> int:
    """Hold a folder; the descriptor. Locked before it gets its name: between the two, another front end's sweep would take the
    folder for a dead one's. Raises OSError.
    """
    guard = os.open(folder / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder / "lock.new", folder / "lock")
    except OSError:
        os.close(guard)
        with contextlib.suppress(OSError):
            os.unlink(folder / "lock.new")  # else the folder could not be removed, nor made again
        raise
    return guard


def sweep(directory: Path) -> int:
    """Remove the folders of dead front ends from the spool directory; the number removed."""
    removed = 0
    for folder in directory.glob(PREFIX + "*"):
        try:
            guard = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            removed += _remove_unborn(folder)
            continue
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        except OSError:
            continue  # its front end lives
        finally:
            os.close(guard)
    return removed


def _remove_unborn(folder: Path) -> bool:
    """Remove a folder without a lock, whose front end died before it had made one; one that is just being made stays."""
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime > _UNBORN_S and os.access(folder, os.W_OK):
            shutil.rmtree(folder)
            return True
    return False
