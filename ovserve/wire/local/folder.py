"""A front end's own folder in the spool directory: created, locked, recreated if it vanishes, and swept after a crash.

The process holds an flock on a file in the folder while it lives. The lock, not a pid (containers reuse pids),
distinguishes the folder of a live front end from that of a dead one, which the next `Folder` in the same directory
removes.

Other programs may remove the folder while it is in use: systemd-logind when the user's last session ends
(logind.conf(5), RemoveIPC), or a cleaner of temporary files. The next `create` then recreates it under the same name.
Requests in flight lose the files that were in it.
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
from ovserve.folders import check_parent, open_private, open_regular
from ovserve.logs import fields

__all__ = ["FULL_RETRY_S", "NO_DESCRIPTOR_ERRNOS", "NO_SPACE_ERRNOS", "Folder", "sweep"]

PREFIX = "ovserve-spool-"
NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
# Each segment holds one descriptor, and a mapped one two, until its exchange ends.
NO_DESCRIPTOR_ERRNOS = (errno.EMFILE, errno.ENFILE)
FULL_RETRY_S = 2  # segments live for as long as one exchange
_UNUSABLE_RETRY_S = 10  # an operator has to repair it
_UNLOCKED_LIFETIME_S = 60.0  # a new folder has its lock much sooner; an older one without a lock is abandoned

log = logging.getLogger(__name__)


class Folder:
    """One locked folder. Thread-safe: yes, one lock.

    Args:
        directory: parent of the folder. The folders of dead front ends in it are removed first.
        on_recreate: called when the folder had vanished and was created again, empty, under the same name.

    Raises:
        OSError: the directory cannot be used, or other users could replace the folder in it.
    """

    def __init__(self, directory: Path, on_recreate: Callable[[], None] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        check_parent(directory)
        sweep(directory)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        self._on_recreate = on_recreate
        self._lock_descriptor = _create_lock(self.path)
        self._unusable_reason = ""
        self._lock = threading.Lock()

    @property
    def unusable_reason(self) -> str:
        """Why no file can be created here, or "". After a failure, each read of this property tries again."""
        if self._unusable_reason:
            with contextlib.suppress(ApiError, OSError):
                path, descriptor = self.create()
                os.close(descriptor)
                os.unlink(path)
        return self._unusable_reason

    def create(self) -> tuple[str, int]:
        """Create a file, open for reading and writing, and return its path and descriptor.

        Raises:
            SpoolFull: no space, or no descriptor, is left for another file.
            SpoolUnusable: the folder cannot be used for another reason.
        """
        try:
            try:
                created = self._open_new()
            except FileNotFoundError:
                self._recreate()
                created = self._open_new()
        except OSError as error:
            is_full = error.errno in NO_SPACE_ERRNOS and self._exists()
            if is_full:
                self._unusable_reason = ""
            if is_full or error.errno in NO_DESCRIPTOR_ERRNOS:
                raise SpoolFull(
                    f"cannot create another file in the spool: {error.strerror}", retry_after_s=FULL_RETRY_S
                ) from None
            if not self._unusable_reason:
                log.error("spool unusable", extra=fields(folder=self.path, why=error.strerror))  # noqa: TRY400
            self._unusable_reason = f"the spool directory cannot be used: {error.strerror}"
            raise SpoolUnusable(self._unusable_reason, retry_after_s=_UNUSABLE_RETRY_S) from None
        self._unusable_reason = ""
        return created

    def close(self) -> None:
        """Remove the folder and its files. Idempotent."""
        with self._lock:
            descriptor, self._lock_descriptor = self._lock_descriptor, -1
        if descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(descriptor)

    def _open_new(self) -> tuple[str, int]:
        path = f"{self.path}/{secrets.token_hex(12)}"
        return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _exists(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path / "lock"), os.fstat(self._lock_descriptor))
        except OSError:
            return False

    def _recreate(self) -> None:
        """Create the folder again under its old name, because messages to workers carry that path.

        Raises:
            OSError: it cannot be created or locked.
        """
        with self._lock:
            if self._lock_descriptor < 0:
                raise FileNotFoundError(errno.ENOENT, "the server is shutting down")
            if self._exists():
                return  # another thread has recreated it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            check_parent(self.path.parent)
            self.path.mkdir(0o700)  # fails if another process has taken the name: its files are not ours
            try:
                descriptor = _create_lock(self.path)
            except OSError:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
                raise
            os.close(self._lock_descriptor)
            self._lock_descriptor = descriptor
        log.warning("spool folder had vanished; recreated", extra=fields(folder=self.path))
        if self._on_recreate:
            self._on_recreate()


def _create_lock(folder: Path) -> int:
    """Create and lock the folder's lock file, and return its descriptor.

    The file is locked before it gets its final name. Otherwise the sweep of another front end could find it unlocked,
    and remove the folder as abandoned.

    Raises:
        OSError: the file cannot be created, locked or renamed.
    """
    inside = open_private(folder)
    try:
        descriptor = open_regular("lock.new", os.O_RDWR | os.O_CREAT, inside)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename("lock.new", "lock", src_dir_fd=inside, dst_dir_fd=inside)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink("lock.new", dir_fd=inside)  # else the folder could not be removed, and so not be recreated
            raise
    finally:
        os.close(inside)
    return descriptor


def sweep(directory: Path) -> int:
    """Remove the folders of dead front ends of this user from the spool directory; return how many were removed.

    In a directory that all users may write, anything else may have such a name too: it is left alone.
    """
    removed = 0
    for folder in directory.glob(PREFIX + "*"):
        try:
            inside = open_private(folder)
        except OSError:
            continue  # not a folder, or another user's
        try:
            descriptor = open_regular("lock", os.O_RDWR, inside)
        except FileNotFoundError:
            removed += _remove_if_abandoned(folder, inside)
            continue
        except OSError:
            continue
        finally:
            os.close(inside)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        except OSError:
            continue  # its front end is alive
        finally:
            os.close(descriptor)
    return removed


def _remove_if_abandoned(folder: Path, inside: int) -> bool:
    """Remove a folder whose front end died before it created the lock. A new one may still get its lock, and stays."""
    with contextlib.suppress(OSError):
        if time.time() - os.fstat(inside).st_mtime > _UNLOCKED_LIFETIME_S:
            shutil.rmtree(folder)
            return True
    return False
