"""Unix sockets that the server listens on: the file's mode and owner, and the file of a server that has ended."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import socket
import stat

from ovserve.settings.options import Settings

__all__ = ["bind_unix", "owner_of"]

PROBE_S = 1.0  # for a process that listens on the socket to accept a connection


def owner_of(settings: Settings) -> tuple[int, int]:
    """Return the numbers of `socket_owner` and `socket_group`, -1 where one is empty. Raises OSError."""
    owner, group = settings.socket_owner, settings.socket_group
    try:
        uid = int(owner) if owner.isdecimal() else pwd.getpwnam(owner).pw_uid if owner else -1
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid if group else -1
    except KeyError as error:
        raise OSError(errno.EINVAL, f"{error.args[0]} (socket_owner, socket_group)") from None
    return uid, gid


def bind_unix(listening: socket.socket, path: str, mode: int, owner: tuple[int, int]) -> None:
    """Bind a Unix socket whose file has this mode and owner; a socket file that no process listens on is replaced.

    Raises:
        OSError: the path is in use, or something else than a socket; or the file cannot be given to the owner.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(PROBE_S)  # a stopped process with a full backlog would keep the start waiting
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except (TimeoutError, BlockingIOError):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
            else:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    old = os.umask(0o777 & ~mode)
    try:
        listening.bind(path)
    finally:
        os.umask(old)
    if owner == (-1, -1):
        return
    try:
        os.chown(path, *owner)
    except OSError:
        os.unlink(path)
        raise
