"""Spool segments: memory-mapped files that carry encoded bytes between the front end and the workers.

The front end alone creates, sizes and unlinks segments; workers open them by path (`open_blob`, `fill`). Space is taken with
posix_fallocate, which makes a full tmpfs an error that can be answered, where writing to a plain mapping would be a SIGBUS.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ovserve.errors import ContentTooLarge, SettingsError, SpoolFull
from ovserve.logs import fields
from ovserve.wire.blobs import Blob
from ovserve.wire.local.folder import FULL_RETRY_S, NO_DESCRIPTORS, NO_ROOM, Folder
from ovserve.wire.local.warm import WarmFile, WarmPool, join

__all__ = ["Segment", "Spool", "default_directory", "fill", "open_blob"]

_WARM_SHARE = 4  # one part in so many of what the spool can hold may be kept warm: the rest is for what is in flight

log = logging.getLogger(__name__)


def default_directory() -> Path:
    """The machine's shared-memory tmpfs where there is one, else the temporary directory."""
    shared = Path("/dev/shm")  # noqa: S108 - tmpfs is the point; segments lie in a folder of mode 0700
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


class Segment:
    """One file. `view` is writable up to `reserved` bytes; beyond that lies address space without pages: do not touch.

    Thread-safe: no; one owner at a time.
    """

    def __init__(self, spool: Spool, ceiling: int, span: int = 0, file: WarmFile | None = None) -> None:
        """`span`: above 0 the file is mapped in this size, and kept warm afterwards. `file`: go on in this one."""
        self._spool = spool
        self._ceiling = ceiling
        self._span = span
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self.reserved = 0
        if file is None:
            self.path, self._descriptor = spool.create_file()
        else:
            self.path, self._descriptor, self._map, self.reserved = file.path, file.descriptor, file.mapping, file.size
            self._view = memoryview(file.mapping)

    @property
    def view(self) -> memoryview:
        """The mapped bytes. Valid until `release`, or until `reserve` has moved the segment to another directory.

        Raises SpoolFull when the system refuses a file of this size, or has no descriptor or memory left to map it.
        """
        if self._view is None:
            if self._descriptor < 0:
                raise ValueError("segment is released")
            size = self._ceiling
            try:
                os.ftruncate(self._descriptor, size)  # address space for all of it: the mapping never moves
                if self._span > size:
                    with contextlib.suppress(OSError):  # what later segments could use is not worth an error now
                        os.ftruncate(self._descriptor, self._span)
                        size = self._span
                self._map = mmap.mmap(self._descriptor, size)  # takes a second descriptor
            except OSError as error:
                if error.errno in NO_ROOM or error.errno in NO_DESCRIPTORS:
                    raise SpoolFull(
                        f"a segment of {size} bytes cannot be mapped: {error.strerror}", retry_after_s=FULL_RETRY_S
                    ) from None
                raise
            self._view = memoryview(self._map)
        return self._view

    def reserve(self, upto: int) -> None:
        """Make the first `upto` bytes safe to touch.

        Raises SpoolFull when there is no room for them, here and in the fallback, and ContentTooLarge when there never can be.

        Take a new `view` afterwards: bytes that found no more room in the spool directory lie in the fallback directory then.
        """
        if upto <= self.reserved:
            return
        if upto > self._ceiling:
            raise ValueError(f"segment of {self._ceiling} bytes asked for {upto}")
        self._spool.check_size(upto)
        self._spool.take(upto - self.reserved)
        try:
            if not _allocate(self._descriptor, self.reserved, upto):
                self._spool.cool()
                if not _allocate(self._descriptor, self.reserved, upto):
                    self._move(upto)
        except BaseException:
            self._spool.give(upto - self.reserved)
            raise
        self.reserved = upto

    def write(self, data: bytes) -> None:
        """Fill the first bytes, reserved before, without mapping them."""
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self._descriptor, view, len(data) - len(view)) :]

    def blob(self, offset: int, size: int) -> Blob:
        """A reference to `size` bytes from `offset`, for a message."""
        return Blob(self.path, offset, size)

    def release(self) -> None:
        """Unlink the file and give its bytes back. Safe to call twice; views handed out before become invalid."""
        if self._descriptor < 0:
            return
        if not self._keep_file():
            self._drop_file()
        self._spool.give(self.reserved)
        self.reserved = 0

    def _keep_file(self) -> bool:
        if not self._span or self._map is None or self._view is None:
            return False
        self._view.release()
        self._view = None
        file = WarmFile(self.path, self._descriptor, self._map, len(self._map), self.reserved)
        is_kept = self._spool.warm.keep(file)
        self.path = file.path
        if is_kept:
            self._descriptor, self._map = -1, None
        return is_kept

    def _move(self, upto: int) -> None:
        """Go on in the fallback directory. Raises SpoolFull when there is none, or no room in it either."""
        folder = self._spool.fallback
        if folder is None or Path(self.path).parent == folder.path:
            raise SpoolFull("the spool directory is full", retry_after_s=FULL_RETRY_S)
        path, descriptor = folder.create()
        try:
            has_room = _allocate(descriptor, 0, upto)
            copied = 0
            while has_room and copied < self.reserved:
                copied += os.sendfile(descriptor, self._descriptor, copied, self.reserved - copied)
        except BaseException:
            os.close(descriptor)
            os.unlink(path)
            raise
        if not has_room:
            os.close(descriptor)
            os.unlink(path)
            raise SpoolFull("the spool directory and its fallback are full", retry_after_s=FULL_RETRY_S)
        log.warning("segment moved to the fallback directory", extra=fields(bytes=upto))
        self._drop_file()
        self.path, self._descriptor = path, descriptor
        self._span = 0  # what is kept warm lies in the spool directory

    def _drop_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                # Somebody still holds a slice; the mapping goes with it. The file's name goes now all the same.
                log.debug("segment %s released while a view is held", self.path)
            self._map = None
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it may be gone; its bytes are given back all the same
            os.unlink(self.path)


def _allocate(descriptor: int, begin: int, end: int) -> bool:
    """Take the room for these bytes; False when there is none."""
    try:
        os.posix_fallocate(descriptor, begin, end - begin)
    except OSError as error:
        if error.errno in NO_ROOM:
            return False
        raise
    return True


def _total_bytes(folder: Path) -> int:
    """What the file system of this folder holds when it is empty."""
    try:
        found = os.statvfs(folder)
    except OSError:  # it has vanished: whoever makes a file in it is told
        return sys.maxsize
    return found.f_blocks * found.f_frsize or sys.maxsize  # none: a tmpfs without a limit


class Spool:
    """The front end's own folder of segments, with a limit on their bytes. Thread-safe: yes, one lock.

    Args:
        directory: where the folder is made; a tmpfs, by preference.
        limit_bytes: of all living segments together, those in the fallback too.
        fallback: a directory for what finds no room in the first; None: SpoolFull at once.
        warm_bytes: of files that are kept for the next uploads, a quarter of the spool at most; they count towards the limit, and
            give way to segments.
    """

    def __init__(self, directory: Path, limit_bytes: int, fallback: Path | None = None, warm_bytes: int = 0) -> None:
        """Raises SettingsError when a directory cannot be used."""
        self._limit = limit_bytes
        self._used = 0
        self._lock = threading.Lock()
        self._folder = _make_folder("spool_dir", directory, self.cool)
        self.directory = self._folder.path
        self.fallback: Folder | None = None
        self._share = min(limit_bytes, _total_bytes(self.directory)) // _WARM_SHARE
        self.warm = WarmPool(self.directory, min(warm_bytes, self._share))
        try:
            if fallback is not None:
                self.fallback = _make_folder("spool_fallback_dir", fallback)
        except SettingsError:
            self.close()
            raise

    @property
    def used_bytes(self) -> int:
        """Bytes of all living segments."""
        return self._used

    @property
    def trouble(self) -> str:
        """Why the spool directory cannot be used, tried again when it could not be; empty where nothing is known to be wrong."""
        return self._folder.trouble

    @property
    def most_bytes(self) -> int:
        """What it could hold if nothing else were in it. Measured anew: operators enlarge a tmpfs where it is mounted."""
        room = _total_bytes(self.directory)
        if self.fallback is not None:
            room += _total_bytes(self.fallback.path)
        return min(self._limit, room)

    def check_size(self, size: int) -> None:
        """Whether one request's bytes could ever lie here together. Raises ContentTooLarge: trying again would change nothing."""
        if size > self._share and size > (most := self.most_bytes):
            raise ContentTooLarge(f"the request takes {size} bytes in the spool of this server, which holds {most}")

    def create_file(self) -> tuple[str, int]:
        """A new file in the spool directory: path and descriptor. Raises SpoolFull and SpoolUnusable."""
        return self._folder.create()

    def create(self, ceiling: int, reserve: int = 0) -> Segment:
        """A segment that may grow to `ceiling` bytes, `reserve` of them usable at once. Raises SpoolFull."""
        segment = Segment(self, max(1, ceiling))
        try:
            segment.reserve(reserve)
        except BaseException:
            segment.release()
            raise
        return segment

    def borrow(self, ceiling: int, wanted: int | None = None) -> Segment:
        """A segment for an upload that may grow to `ceiling` bytes, in a warm file where there is one. Raises SpoolFull.

        `wanted`: how many of them are known to come; None: all. For bytes that only the front end writes: a warm file still has the bytes of the upload before.
        """
        ceiling = max(1, ceiling)
        file = self.warm.lend(ceiling, ceiling if wanted is None else wanted)
        if file is not None:
            try:
                self.take(file.size)
            except SpoolFull:
                file.close()  # there may be room for as much as will come
            else:
                return Segment(self, ceiling, file.span, file)
        return Segment(self, ceiling, self.warm.span_for(ceiling))

    def cool(self) -> None:
        """Give up all warm files."""
        self.warm.drop(self.warm.size)

    def store(self, data: bytes) -> Segment:
        """A segment with exactly these bytes. Raises SpoolFull."""
        segment = self.create(len(data), reserve=len(data))
        try:
            segment.write(data)
        except BaseException:
            segment.release()
            raise
        return segment

    def take(self, size: int) -> None:
        """Account for `size` more bytes; warm files give way to them. Raises SpoolFull at the limit."""
        excess = self._used + self.warm.size + size - self._limit
        if excess > 0:
            self.warm.drop(excess)
        with self._lock:
            if self._used + size > self._limit:
                raise SpoolFull(
                    f"uploads and results in flight are at the limit of {self._limit} bytes",
                    retry_after_s=FULL_RETRY_S,
                )
            self._used += size

    def give(self, size: int) -> None:
        """Account for `size` fewer bytes."""
        with self._lock:
            self._used -= size

    def close(self) -> None:
        """Remove the folders with all that is in them. Safe to call twice."""
        self.cool()
        self._folder.close()
        if self.fallback is not None:
            self.fallback.close()


def _make_folder(option: str, directory: Path, on_loss: Callable[[], None] | None = None) -> Folder:
    try:
        return Folder(directory, on_loss)
    except OSError as error:
        raise SettingsError(f"{option} {directory}: {error.strerror}") from None


@contextmanager
def open_blob(blob: Blob) -> Iterator[memoryview]:
    """The bytes of a blob, mapped read-only. Runs in: worker. Raises FileNotFoundError when the exchange has ended."""
    descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        join(descriptor, blob.path)
        with mmap.mmap(descriptor, blob.offset + blob.size, prot=mmap.PROT_READ) as mapped:
            whole = memoryview(mapped)
            part = whole[blob.offset : blob.offset + blob.size]
            try:
                yield part
            finally:
                part.release()
                whole.release()
    finally:
        os.close(descriptor)


def fill(path: str, data: bytes | memoryview) -> None:
    """Write the announced bytes into a segment. Runs in: worker. Raises FileNotFoundError when the exchange has ended."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
