"""Private folders: the server's own folders, in directories that other users of the machine may read or share.

Another user must not read uploads and pictures, nor make the server write elsewhere through a symbolic link. So each
folder has mode 0700 and belongs to the server's user, which is checked on the open descriptor, not on the path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

from ovserve.errors import SettingsError

__all__ = ["check_parent", "open_private", "open_regular", "user_cache"]

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def user_cache(option: str) -> Path:
    """Return systemd's CacheDirectory, else `ovserve` in the user's cache directory. It need not exist.

    For a user without a home directory it is a private folder in the temporary directory, which is created here.

    Args:
        option: the option that chooses another directory, for the message.

    Raises:
        SettingsError: another user can write to that folder.
    """
    if given := os.environ.get("CACHE_DIRECTORY"):
        return Path(given.partition(":")[0])
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ovserve"
    try:
        return Path.home() / ".cache" / "ovserve"
    except RuntimeError:  # no HOME and no entry in the user database: systemd's DynamicUser, a container's uid
        return _temporary_folder(option)


def _temporary_folder(option: str) -> Path:
    """Return the folder of this user in the temporary directory; create it if needed. Raises SettingsError."""
    folder = Path(tempfile.gettempdir()) / f"ovserve-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise SettingsError(f"no home directory, and {folder} cannot be used: {error.strerror}; set {option}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SettingsError(f"no home directory, and {folder} is not private to this user; set {option}")
    return folder


def check_parent(directory: Path) -> None:
    """Check that other users cannot replace a folder in this directory.

    Others may read it. They may write it only if it has the sticky bit, as the directories of temporary files have:
    then only its owner can remove or rename a folder.

    Raises:
        PermissionError: with EPERM, they can.
        OSError: the directory cannot be read.
    """
    mode = os.stat(directory).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        reason = f"every user can write it (mode {stat.S_IMODE(mode):04o}), and it has no sticky bit"
        raise PermissionError(errno.EPERM, reason, str(directory))


def open_private(path: Path, *, create: bool = False) -> int:
    """Open a private folder and return its descriptor.

    Args:
        path: the folder. Its parent may be reached through symbolic links, the folder itself may not be one.
        create: whether to create it, and its parents, if it does not exist.

    Raises:
        PermissionError: with EPERM, it is a symbolic link, belongs to another user or cannot be made private, or its
            parent is unsafe.
        OSError: it cannot be opened or created.
    """
    try:
        descriptor = os.open(path, _FOLDER_FLAGS)
    except FileNotFoundError:
        if not create:
            raise
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_parent(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        descriptor = os.open(path, _FOLDER_FLAGS)
    except NotADirectoryError:
        if path.is_symlink():
            raise PermissionError(errno.EPERM, "is a symbolic link", str(path)) from None
        raise
    try:
        _make_private(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make_private(descriptor: int, path: Path) -> None:
    info = os.fstat(descriptor)
    if info.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"belongs to another user (uid {info.st_uid})", str(path))
    if stat.S_IMODE(info.st_mode) & 0o777 != 0o700:
        os.fchmod(descriptor, 0o700)
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o777 != 0o700:
            raise PermissionError(errno.EPERM, "its file system does not keep mode 0700", str(path))


def open_regular(name: str, flags: int, folder: int) -> int:
    """Open a regular file of a folder; never a symbolic link, and no wait for the other end of a FIFO.

    Args:
        name: name of the file, without a directory.
        flags: of open(2).
        folder: descriptor of the folder.

    Raises:
        OSError: it cannot be opened, or is something else; for a symbolic link with ELOOP.
    """
    descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return descriptor
