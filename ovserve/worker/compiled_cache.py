"""The cache of compiled models: one folder for each model, whose files are served only if their checksums are right.

    ROOT/
      KEY/               of the model's files, the OpenVINO release and the processor
        lock             held while a worker loads: shared, or exclusive if it writes to the folder
        checksums.json   size and checksums of every other file
        *.blob, *.json   what OpenVINO and the engines store

OpenVINO itself notices a blob that is cut short or of another release, but not a flipped byte inside the weights: the
picture is then another one. So a file that is not listed, or differs from its checksums, is deleted before anything is
loaded. A worker that dies while it writes leaves unlisted files.

Checksums are CRC-32 of each MiB. They are meant for damage by disks and interrupted writes: another user cannot write
to the folder (mode 0700).
Runs in: worker, device thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ovserve.errors import SettingsError
from ovserve.folders import open_private, user_cache
from ovserve.logs import fields
from ovserve.models.fingerprint import fingerprint
from ovserve.models.profile import ModelProfile
from ovserve.models.weights import weights_bytes
from ovserve.settings.options import NO_CACHE, ModelSettings
from ovserve.settings.worker import WorkerSettings

__all__ = ["CompiledCache", "cache_root", "open_cache"]

CHUNK_BYTES = 1 << 20
LOCK_WAIT_S = 30.0  # for another worker that loads the same model; then this one loads without the cache
_LOCK_POLL_S = 0.1
_THREADS = 4  # that compute checksums; zlib releases the interpreter lock
_MAX_MANIFEST_BYTES = 64 << 20
_SPACE_FACTOR = 1.5  # blobs are about as large as the weights
_SPARE_BYTES = 64 << 20  # of the file system that the cache leaves free
_LOCK, _MANIFEST = "lock", "checksums.json"

log = logging.getLogger(__name__)

Entry = list[int]  # of a file: its size, then the checksum of each chunk


def cache_root(model: ModelSettings) -> Path | None:
    """Return the folder of the option `cache_dir`; None: no cache. Raises SettingsError."""
    if model.cache_dir == NO_CACHE:
        return None
    return model.cache_dir or user_cache("cache_dir") / "compiled"


def open_cache(
    profile: ModelProfile, model: ModelSettings, settings: WorkerSettings, beat: Callable[[], None]
) -> CompiledCache | None:
    """Open the cache for one model; None: load without it, because of the options or of a reason in the log.

    Args:
        profile: the model.
        model: its options.
        settings: the limits.
        beat: called as often as possible while files are checked.
    """
    try:
        root = cache_root(model)
        if root is None:
            return None
        cache = CompiledCache(root, cache_key(profile, root), settings.cache_bytes, beat)
        return cache if cache.open(weights_bytes(profile.directory)) else None
    except (OSError, SettingsError) as error:
        log.warning("compiled models are not cached: %s", error)
        return None


def cache_key(profile: ModelProfile, root: Path) -> str:
    """Return the name of a model's folder: it changes with the model's files, OpenVINO and the processor."""
    try:
        library = version("openvino")
    except PackageNotFoundError:  # installed as files only; blobs name their release too
        library = ""
    directory = os.path.realpath(profile.directory)
    subject = [directory, fingerprint(profile.directory, root), library, platform.machine(), _processor()]
    return f"{profile.directory.name[:40]}-{hashlib.blake2b(json.dumps(subject).encode(), digest_size=12).hexdigest()}"


def _processor() -> str:
    """Return the model name and instruction sets of the processor: blobs hold code and layouts for them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
        return f"{found.get('model name', '')} {found.get('flags', '')}"
    return platform.processor()


class CompiledCache:
    """The folder of one model.

    Args:
        root: the folder of all models.
        key: name of the model's folder.
        limit_bytes: size of all folders together.
        beat: called as often as possible while files are checked.
    """

    def __init__(self, root: Path, key: str, limit_bytes: int, beat: Callable[[], None] = lambda: None) -> None:
        self.folder = root / key
        self._root = root
        self._limit_bytes = limit_bytes
        self._beat = beat
        self._lock = -1
        self._entries: dict[str, Entry] = {}

    def open(self, expected_bytes: int = 0) -> bool:
        """Lock the folder, and delete from it what is damaged. Return False if it cannot be used now.

        Args:
            expected_bytes: about what a load into an empty folder writes.

        Raises:
            OSError: the folder cannot be used.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(open_private(self.folder, create=True))
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            is_usable = self._open_locked(expected_bytes)
        except BaseException:
            self.close()
            raise
        if not is_usable:
            self.close()
        return is_usable

    def _open_locked(self, expected_bytes: int) -> bool:
        if not self._acquire(fcntl.LOCK_SH):
            return False
        found = self._read_manifest()
        self._entries = found or {}
        if found is not None and not self._damaged():
            os.utime(self.folder / _MANIFEST)  # the order in which folders are deleted
            return bool(found) or self._has_space(expected_bytes)
        # The lock is given up in between, so that two workers that both need it do not wait for each other.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        if not self._acquire(fcntl.LOCK_EX):
            return False
        self._entries = self._read_manifest() or {}
        for name in self._damaged():
            log.warning("damaged or unlisted file of the cache deleted", extra=fields(folder=self.folder, file=name))
            self._entries.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
        return bool(self._entries) or self._has_space(expected_bytes)

    def _has_space(self, expected_bytes: int) -> bool:
        """Return whether a load can write its files."""
        needed, space = int(_SPACE_FACTOR * expected_bytes), os.statvfs(self.folder)
        free = max(0, space.f_bavail * space.f_frsize - _SPARE_BYTES)
        if needed <= min(free, self._limit_bytes) and free:
            return True
        log.warning(
            "compiled model is not cached: too little space",
            extra=fields(folder=self.folder, needed=needed, free=free, cache_bytes=self._limit_bytes),
        )
        return False

    def record(self) -> None:
        """List the files that were written since `open`, delete old folders above the limit, and unlock the folder.

        Best effort. A worker goes on with deleted files that it has mapped.
        """
        try:
            new = [name for name in self._names() if name not in self._entries]
            if (new or not (self.folder / _MANIFEST).exists()) and self._try_exclusive():
                self._entries |= self._checked(new)
                self._write_manifest()
            self._clean()
        except OSError as error:
            log.warning("compiled model not recorded in the cache, so it is compiled again: %s", error)
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Unlock the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # --- locks --------------------------------------------------------------------------------------------------------

    def _acquire(self, operation: int) -> bool:
        """Lock the folder; return False when another worker keeps it for too long."""
        end = time.monotonic() + LOCK_WAIT_S
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, operation | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(self._lock), os.stat(self.folder / _LOCK)):
                    raise FileNotFoundError(errno.ENOENT, "deleted by another worker meanwhile", str(self.folder))
                return True
            if time.monotonic() > end:
                log.warning("another worker holds the cache of this model; loading without it")
                return False
            self._beat()
            time.sleep(_LOCK_POLL_S)

    def _try_exclusive(self) -> bool:
        """Lock the folder for writing, unless others load from it: they could see half of the list."""
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._lock), os.stat(self.folder / _LOCK))
        return False

    # --- checksums ----------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        with os.scandir(self.folder) as found:
            return sorted(each.name for each in found if each.name not in (_LOCK, _MANIFEST))

    def _damaged(self) -> list[str]:
        """Return the files that are not listed or differ from their checksums, and listed ones that are missing."""
        names = self._names()
        checked = self._checked([name for name in names if name in self._entries])
        return [name for name in {*names, *self._entries} if checked.get(name) != self._entries.get(name, [])]

    def _checked(self, names: list[str]) -> dict[str, Entry]:
        """Return the size and the checksums of files; those that are no regular files are left out."""
        found: dict[str, Entry] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for name in names:
                try:
                    descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                except OSError:
                    continue
                try:
                    size = os.fstat(descriptor).st_size
                    offsets = range(0, size, CHUNK_BYTES)
                    found[name] = [size]
                    for checksum in pool.map(lambda at, fd=descriptor: _checksum(fd, at), offsets):
                        found[name].append(checksum)
                        self._beat()
                except OSError as error:  # a directory, or a disk that cannot read it
                    log.warning("file of the cache cannot be read: %s", error)
                    found.pop(name, None)
                finally:
                    os.close(descriptor)
        return found

    def _read_manifest(self) -> dict[str, Entry] | None:
        """Return the listed files, or None if there is no list that can be read."""
        try:
            with (self.folder / _MANIFEST).open("rb") as stream:
                document = json.loads(stream.read(_MAX_MANIFEST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        return {name: entry for name, entry in document.items() if isinstance(entry, list) and "/" not in name}

    def _write_manifest(self) -> None:
        fresh = self.folder / f"{_MANIFEST}.new"
        with fresh.open("w", encoding="ascii") as stream:
            json.dump(self._entries, stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self.folder / _MANIFEST)

    # --- the size of all folders --------------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Delete the folders of other models, the least recently used first, while all together exceed the limit."""
        folders = sorted(_folders(self._root), key=_last_used)
        sizes = {folder: _size_of(folder) for folder in folders}
        total = sum(sizes.values())
        for folder in folders:
            if total <= self._limit_bytes:
                return
            if folder != self.folder and _delete(folder):
                total -= sizes[folder]


def _checksum(descriptor: int, offset: int) -> int:
    return zlib.crc32(os.pread(descriptor, CHUNK_BYTES, offset))


def _folders(root: Path) -> Iterator[Path]:
    with os.scandir(root) as found:
        yield from (Path(each.path) for each in found if each.is_dir(follow_symlinks=False))


def _last_used(folder: Path) -> float:
    try:
        return (folder / _MANIFEST).stat().st_mtime
    except OSError:  # its first load has not ended, or was interrupted
        return 0.0


def _size_of(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for each in found:
            with contextlib.suppress(OSError):
                total += each.stat(follow_symlinks=False).st_size
    return total


def _delete(folder: Path) -> bool:
    """Delete a folder that no worker uses; return whether it was deleted. Other folders are left alone."""
    if not (folder / _LOCK).is_file():
        return False
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except OSError:
        return False
    finally:
        os.close(lock)
    log.info("least recently used compiled model deleted", extra=fields(folder=folder))
    return True
