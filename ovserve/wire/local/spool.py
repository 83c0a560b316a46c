"""Spool segments: memory-mapped files that carry encoded bytes between the front end and the workers.

Only the front end creates, sizes and unlinks segments; workers open them by id (`wire.local.blobs`). Space is
allocated with posix_fallocate, so a full tmpfs is an error with a response, where a write to a plain mapping would be a
SIGBUS.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ovserve.accounts import Account, Holding
from ovserve.errors import ContentTooLarge, SettingsError, SpoolFull, may_pass
from ovserve.logs import fields
from ovserve.wire.blobs import ROOM_WAIT_S, Blob
from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.local.file_pool import FilePool, PooledFile
from ovserve.wire.local.folder import FULL_RETRY_S, NO_DESCRIPTOR_ERRNOS, NO_SPACE_ERRNOS, Folder

__all__ = ["Spool", "SpoolSegment", "default_directory"]

# Below this much space for requests, counted as if none were in flight, the server is not ready. A photograph and its
# result take about as much. In a smaller spool, it is a quarter of the capacity.
_MIN_FREE_BYTES = 4 * 1024 * 1024
_MIN_FREE_SHARE = 4
_POOL_SHARE = 4  # the pool may hold at most 1/4 of the spool's capacity: the rest is for requests in flight

log = logging.getLogger(__name__)


def default_directory() -> Path:
    """Return the machine's shared-memory tmpfs if it is writable, else the directory for temporary files."""
    shared = Path("/dev/shm")  # noqa: S108 - tmpfs is the point; segments lie in a folder of mode 0700
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


class SpoolSegment:
    """One file of the spool. `view` is writable up to `reserved` bytes; beyond that it has no pages: do not touch it.

    Thread-safe: no; one owner at a time.

    Args:
        spool: where it is created and accounted for.
        max_bytes: it may grow to this size.
        holding: what its bytes count for.
        wait_s: how long `reserve` waits for clients that were made to give way.
        mapping_bytes: if above 0, the file is mapped in this size and goes to the pool on release.
        file: an open file from the pool to use; None: create one.
    """

    def __init__(
        self,
        spool: Spool,
        max_bytes: int,
        holding: Holding,
        wait_s: float = 0.0,
        *,
        mapping_bytes: int = 0,
        file: PooledFile | None = None,
    ) -> None:
        self._spool = spool
        self._max_bytes = max_bytes
        self._holding = holding
        self._wait_s = wait_s
        self._mapping_bytes = mapping_bytes
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self.reserved = 0
        if file is None:
            self.path, self._descriptor = spool.create_file()
        else:
            self.path, self._descriptor, self._map = file.path, file.descriptor, file.mapping
            self.reserved = file.allocated_bytes
            self._view = memoryview(file.mapping)

    @property
    def view(self) -> memoryview:
        """The mapped bytes. Valid until `release`, or until `reserve` moves the segment to the fallback directory.

        Raises:
            SpoolFull: the system rejects a file of this size, or has no descriptor or memory left to map it.
            ValueError: the segment is released.
        """
        if self._view is None:
            if self._descriptor < 0:
                raise ValueError("segment is released")
            size = self._max_bytes
            try:
                os.ftruncate(self._descriptor, size)  # address space for all of it: the mapping never moves
                if self._mapping_bytes > size:
                    with contextlib.suppress(OSError):  # the extra bytes are only for later segments
                        os.ftruncate(self._descriptor, self._mapping_bytes)
                        size = self._mapping_bytes
                self._map = mmap.mmap(self._descriptor, size)  # takes a second descriptor
            except OSError as error:
                if error.errno in NO_SPACE_ERRNOS or error.errno in NO_DESCRIPTOR_ERRNOS:
                    raise SpoolFull(
                        f"a segment of {size} bytes cannot be mapped: {error.strerror}", retry_after_s=FULL_RETRY_S
                    ) from None
                raise
            self._view = memoryview(self._map)
        return self._view

    @property
    def id(self) -> str:
        """The name of the file, by which a worker's SpoolBlobs finds it."""
        return os.path.basename(self.path)

    def reserve(self, size: int) -> None:
        """Allocate the first `size` bytes, so that they are safe to touch.

        Take a new `view` afterwards: if the spool directory is full, the segment moves to the fallback directory.

        Raises:
            SpoolFull: neither the spool directory nor the fallback has space for them now.
            ContentTooLarge: the spool could never hold them.
        """
        if size <= self.reserved:
            return
        if size > self._max_bytes:
            raise ValueError(f"reserve of {size} bytes; this segment may have at most {self._max_bytes}")
        self._spool.check_size(size)
        more = size - self.reserved
        self._spool.charge(more, self._holding, self._wait_s)
        try:
            if not self._has_allocated(size):
                self._move_to_fallback(size)
        except BaseException:
            self._holding.give(more)
            raise
        self.reserved = size

    def _has_allocated(self, size: int) -> bool:
        """Allocate the file up to `size`; return False if the file system has no room, whatever is given up for it."""
        if _allocate(self._descriptor, self.reserved, size):
            return True
        self._spool.empty_pool()
        if _allocate(self._descriptor, self.reserved, size):
            return True
        if self._spool.fallback is not None or not self._holding.reclaim(size - self.reserved, self._wait_s):
            return False
        return _allocate(self._descriptor, self.reserved, size)

    def read(self, offset: int, size: int) -> bytes:
        """Return at most `size` bytes from `offset` without mapping the segment. Raises ValueError after `release`."""
        if self._descriptor < 0:
            raise ValueError("segment is released")
        return os.pread(self._descriptor, size, offset)

    def write(self, data: bytes) -> None:
        """Write the data at the start of the segment without mapping it. The bytes have to be reserved."""
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self._descriptor, view, len(data) - len(view)) :]

    def blob(self, offset: int, size: int) -> Blob:
        """Return a reference to `size` bytes from `offset`, for a message."""
        return Blob(self.id, offset, size)

    def release(self) -> None:
        """Unlink the file, or put it into the pool, and free its bytes. Views become invalid. Idempotent."""
        if self._descriptor < 0:
            return
        if not self._put_into_pool():
            self._close_file()
        self._holding.give(self.reserved)
        self.reserved = 0

    def _put_into_pool(self) -> bool:
        if not self._mapping_bytes or self._map is None or self._view is None:
            return False
        self._view.release()
        self._view = None
        file = PooledFile(self.path, self._descriptor, self._map, len(self._map), self.reserved)
        is_pooled = self._spool.file_pool.add(file)
        self.path = file.path
        if is_pooled:
            self._descriptor, self._map = -1, None
        return is_pooled

    def _move_to_fallback(self, size: int) -> None:
        """Move the segment to a file of `size` bytes in the fallback directory.

        Raises:
            SpoolFull: there is no fallback directory, or it is full too.
        """
        folder = self._spool.fallback
        if folder is None or Path(self.path).parent == folder.path:
            raise SpoolFull("the spool directory is full", retry_after_s=FULL_RETRY_S)
        path, descriptor = folder.create()
        try:
            is_allocated = _allocate(descriptor, 0, size)
            copied = 0
            while is_allocated and copied < self.reserved:
                copied += os.sendfile(descriptor, self._descriptor, copied, self.reserved - copied)
        except BaseException:
            os.close(descriptor)
            os.unlink(path)
            raise
        if not is_allocated:
            os.close(descriptor)
            os.unlink(path)
            raise SpoolFull("the spool directory and its fallback are full", retry_after_s=FULL_RETRY_S)
        log.warning("segment moved to the fallback directory", extra=fields(bytes=size))
        self._close_file()
        self.path, self._descriptor = path, descriptor
        self._mapping_bytes = 0  # pooled files have to lie in the spool directory

    def _close_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                # A slice of the view is still held; the mapping is freed with it. The file is still unlinked
                # now.
                log.debug("segment %s released while a view is held", self.path)
            self._map = None
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it may have been removed; closing it has freed its bytes
            os.unlink(self.path)


def _allocate(descriptor: int, begin: int, end: int) -> bool:
    """Allocate this range of a file; return False if there is no space."""
    try:
        os.posix_fallocate(descriptor, begin, end - begin)
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            return False
        raise
    return True


def _file_system_bytes(folder: Path) -> int:
    """Return the total size of the folder's file system; sys.maxsize if it has no limit or is unknown."""
    try:
        found = os.statvfs(folder)
    except OSError:  # the folder has vanished; the next `create` reports it
        return sys.maxsize
    return found.f_blocks * found.f_frsize or sys.maxsize  # 0: a tmpfs without a limit


def _free_bytes(folder: Path) -> int:
    """Return how many bytes of the folder's file system are free; sys.maxsize if it has no limit or is unknown."""
    try:
        found = os.statvfs(folder)
    except OSError:  # the folder has vanished; the next `create` reports it
        return sys.maxsize
    if found.f_files and not found.f_favail:
        return 0  # no file can be created, whatever its size
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize


class Spool:
    """The front end's folder of segments, with a limit on their total size. Thread-safe: yes, one lock.

    Args:
        directory: where the folder is created; preferably a tmpfs.
        limit_bytes: limit for all live segments together, those in the fallback included.
        fallback: a directory for segments that do not fit into the first; None: SpoolFull at once.
        warm_bytes: limit for pooled files, which are reused for later uploads; at most a quarter of the spool. They
            count towards `limit_bytes` and are evicted when segments need the space.

    Raises:
        SettingsError: a directory cannot be used.
    """

    def __init__(self, directory: Path, limit_bytes: int, fallback: Path | None = None, warm_bytes: int = 0) -> None:
        self._limit_bytes = limit_bytes
        self.account = Account(limit_bytes)
        self._unowned = self.account.open("")  # of segments that are created without a holding
        self._folder = _make_folder("spool_dir", directory, self.empty_pool)
        self.directory = self._folder.path
        self.fallback: Folder | None = None
        self._pool_share_bytes = min(limit_bytes, _file_system_bytes(self.directory)) // _POOL_SHARE
        self.file_pool = FilePool(self.directory, min(warm_bytes, self._pool_share_bytes))
        try:
            if fallback is not None:
                self.fallback = _make_folder("spool_fallback_dir", fallback)
        except SettingsError:
            self.close()
            raise

    @property
    def used_bytes(self) -> int:
        """Bytes of all live segments."""
        return self.account.used

    @property
    def unusable_reason(self) -> str:
        """Why the spool cannot be used, or "". After a failure, each read of this property tries again.

        It cannot be used either when other files leave no space on its file system. Segments in flight do not count:
        they are gone soon, and a server under load stays ready.
        """
        if reason := self._folder.unusable_reason:
            return reason
        free = self._free_file_system_bytes() + self.used_bytes
        if free < min(_MIN_FREE_BYTES, self.capacity_bytes // _MIN_FREE_SHARE):
            return f"the file system of the spool is full: {free} bytes are left for requests"
        return ""

    @property
    def free_bytes(self) -> int:
        """How many bytes of requests fit now, by the limit and by the space on the file systems."""
        return max(0, min(self._limit_bytes - self.used_bytes, self._free_file_system_bytes()))

    def _free_file_system_bytes(self) -> int:
        """Return the free space on the file systems, pooled files included: they are removed when space is needed."""
        folders = [self.directory] if self.fallback is None else [self.directory, self.fallback.path]
        return sum(map(_free_bytes, folders)) + self.file_pool.size_bytes

    @property
    def capacity_bytes(self) -> int:
        """How much it could hold if it were empty. Measured each time, because a mounted tmpfs can be resized."""
        capacity = _file_system_bytes(self.directory)
        if self.fallback is not None:
            capacity += _file_system_bytes(self.fallback.path)
        return min(self._limit_bytes, capacity)

    def check_size(self, size: int) -> None:
        """Check that one request's bytes could fit into the empty spool.

        Raises:
            ContentTooLarge: they could not, so a retry would not help.
        """
        # What fits into the pool's share fits into the spool: no need to ask the file system.
        if size > self._pool_share_bytes and size > (capacity := self.capacity_bytes):
            raise ContentTooLarge(
                f"the request takes {size} bytes of spool space; the spool of this server holds {capacity}"
            )

    def create_file(self) -> tuple[str, int]:
        """Create a file in the spool directory; return its path and descriptor. Raises SpoolFull and SpoolUnusable."""
        return self._folder.create()

    def create(
        self, max_bytes: int, reserve: int = 0, holding: Holding | None = None, wait_s: float = 0.0
    ) -> SpoolSegment:
        """Create a segment that may grow to `max_bytes`, with `reserve` bytes allocated. Raises SpoolFull.

        Waits at most `wait_s` for clients that were made to give way.
        """
        segment = SpoolSegment(self, max(1, max_bytes), holding or self._unowned, wait_s)
        try:
            segment.reserve(reserve)
        except BaseException:
            segment.release()
            raise
        return segment

    def create_for_upload(
        self, max_bytes: int, expected_bytes: int | None = None, holding: Holding | None = None
    ) -> SpoolSegment:
        """Create a segment for an upload, in a file from the pool if one fits. Raises SpoolFull.

        Only for bytes that the front end writes: a pooled file still has the bytes of an earlier upload.

        Args:
            max_bytes: it may grow to this size.
            expected_bytes: how many bytes are known to come; None: `max_bytes`.
            holding: what its bytes count for.
        """
        max_bytes, holding = max(1, max_bytes), holding or self._unowned
        file = self.file_pool.acquire(max_bytes, max_bytes if expected_bytes is None else expected_bytes)
        if file is not None:
            if holding.take(file.allocated_bytes, may_end=False):
                return SpoolSegment(self, max_bytes, holding, ROOM_WAIT_S, mapping_bytes=file.mapping_bytes, file=file)
            file.close()  # the bytes that really come may still fit
        mapping_bytes = self.file_pool.mapping_bytes_for(max_bytes)
        return SpoolSegment(self, max_bytes, holding, ROOM_WAIT_S, mapping_bytes=mapping_bytes)

    def empty_pool(self) -> None:
        """Close all pooled files."""
        self.file_pool.evict(self.file_pool.size_bytes)

    def put(self, data: bytes, holding: Holding | None = None) -> SpoolSegment:
        """Create a segment with exactly these bytes. Raises SpoolFull. May wait ROOM_WAIT_S for room."""
        segment = self.create(len(data), len(data), holding, ROOM_WAIT_S)
        try:
            segment.write(data)
        except BaseException:
            segment.release()
            raise
        return segment

    def worker_blobs(self) -> SpoolBlobs:
        """Return what a worker needs to find the segments."""
        folders = [self.directory] if self.fallback is None else [self.directory, self.fallback.path]
        return SpoolBlobs(tuple(map(str, folders)))

    def charge(self, size: int, holding: Holding, wait_s: float = 0.0) -> None:
        """Count `size` more bytes as used; pooled files are evicted to stay within the limit.

        Raises:
            SpoolFull: live segments alone would exceed the limit, and no other client gave way in time.
        """
        excess = self.used_bytes + self.file_pool.size_bytes + size - self._limit_bytes
        if excess > 0:
            self.file_pool.evict(excess)
        if not holding.take(size, wait_s):
            raise SpoolFull(
                f"uploads and results in flight have reached the spool limit of {self._limit_bytes} bytes",
                retry_after_s=FULL_RETRY_S,
            )

    def close(self) -> None:
        """Remove the folders and all their files. Idempotent."""
        self.empty_pool()
        self._folder.close()
        if self.fallback is not None:
            self.fallback.close()


def _make_folder(option: str, directory: Path, on_recreate: Callable[[], None] | None = None) -> Folder:
    try:
        return Folder(directory, on_recreate)
    except OSError as error:
        raise SettingsError(
            f"{option} {directory} cannot be used: {error.strerror}", is_transient=may_pass(error)
        ) from None
