"""Download one file: resume what is there, check size and sum, and give it its name only then.

The bytes are written to `NAME.part`; `NAME.etag` holds the tag of the response that they are from. A later request
continues after them with Range and If-Range, in this process or in another one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import random
import re
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ovserve.errors import HubError
from ovserve.folders import open_regular
from ovserve.hub.client import HubClient, Response
from ovserve.hub.listing import Listing, RemoteFile
from ovserve.hub.progress import Meter

__all__ = ["Download", "Retries", "Stopped", "open_folder", "part_size", "receive", "with_retries"]

PIECE_BYTES = 1 << 20
MAX_ETAG_CHARS = 200
_T = TypeVar("_T")
_JITTER = (0.75, 1.25)
_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]{1,198}"')  # RFC 9110 section 8.8.3, without obs-text
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")


class Stopped(Exception):
    """The pull was ended; what is on disk is used by the next one."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request is repeated that fails for a reason that may pass.

    Attributes:
        limit: attempts in a row that bring no byte.
        delay_s: before the first repetition; doubles with each further one.
        max_delay_s: maximum of that.
    """

    limit: int = 7
    delay_s: float = 0.5
    max_delay_s: float = 30.0

    def wait_s(self, failures: int, error: HubError) -> float:
        """Return the time to wait after this many failures in a row; what the hub asks for is a minimum."""
        delay_s = min(self.max_delay_s, self.delay_s * 2.0 ** min(failures - 1, 16)) * random.uniform(*_JITTER)  # noqa: S311
        return max(delay_s, error.retry_after_s or 0.0)


def with_retries(attempt: Callable[[], _T], retries: Retries, stop: threading.Event, progress: Callable[[], int]) -> _T:
    """Return the result of an attempt that succeeds; repeat those that fail for a reason that may pass.

    Args:
        attempt: raises HubError.
        retries: the limit and the delays.
        stop: ends the wait.
        progress: returns a number that grows when bytes arrive; then failures are counted from the start.

    Raises:
        HubError: of the last attempt.
        Stopped: `stop` was set.
    """
    failures, before = 0, progress()
    while True:
        if stop.is_set():
            raise Stopped
        try:
            return attempt()
        except HubError as error:
            if stop.is_set():
                raise Stopped from None
            now = progress()
            failures, before = (1, now) if now > before else (failures + 1, before)
            if not error.is_transient or failures >= retries.limit:
                raise
            if stop.wait(retries.wait_s(failures, error)):
                raise Stopped from None


def open_folder(root: int, parts: tuple[str, ...]) -> int:
    """Open a folder below `root`, and create what is missing of it; never through a symbolic link. Raises OSError."""
    folder = os.dup(root)
    for part in parts:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=folder)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def part_size(root: Path, file: RemoteFile) -> int:
    """Return how many bytes of a file are on disk already, finished or not."""
    for path in (root / file.path, root / f"{file.path}.part"):
        with contextlib.suppress(OSError):
            info = os.stat(path, follow_symlinks=False)
            if stat.S_ISREG(info.st_mode):
                return min(info.st_size, file.size)
    return 0


@dataclass(frozen=True, slots=True)
class Download:
    """What the transfers of one pull share.

    Attributes:
        client: the hub.
        listing: the repository at one commit.
        meter: counts the bytes.
        retries: for failures that may pass.
        stop: ends the transfers.
    """

    client: HubClient
    listing: Listing
    meter: Meter
    retries: Retries
    stop: threading.Event


def receive(download: Download, file: RemoteFile, root: int) -> None:
    """Download one file into the directory `root` (a descriptor).

    Raises:
        HubError: the hub refuses, what it sends has a wrong size or sum, or it does not answer after all repetitions.
        OSError: the file cannot be written.
        Stopped: `stop` was set.
    """
    *folders, name = file.path.split("/")
    folder = open_folder(root, tuple(folders))
    download.meter.begin(file.path)
    try:
        _Transfer(download, file, folder, name).run()
    finally:
        download.meter.end(file.path)
        os.close(folder)


class _Transfer:
    """The download of one file."""

    def __init__(self, download: Download, file: RemoteFile, folder: int, name: str) -> None:
        self._client = download.client
        self._listing = download.listing
        self._meter = download.meter
        self._retries = download.retries
        self._stop = download.stop
        self._file = file
        self._folder = folder
        self._name = name
        self._size = 0  # of the part
        self._furthest = 0  # largest size of the part so far: what a restart loses counts once
        self._mismatches = 0
        self._digest: hashlib._Hash | None = None  # of the part's bytes, once they are read
        self._what = f"{self._listing.repository}: {file.path}"

    def run(self) -> None:
        """Download the file and give it its name."""
        if self._is_there():
            return
        part = open_regular(f"{self._name}.part", os.O_RDWR | os.O_CREAT, self._folder)
        try:
            with_retries(lambda: self._attempt(part), self._retries, self._stop, lambda: self._furthest)
            os.fsync(part)
        finally:
            os.close(part)
        os.rename(f"{self._name}.part", self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._name}.etag", dir_fd=self._folder)

    def _is_there(self) -> bool:
        """Return whether the file itself is there, with its sum; one with another sum is removed."""
        try:
            existing = open_regular(self._name, os.O_RDONLY, self._folder)
        except FileNotFoundError:
            return False
        try:
            size = os.fstat(existing).st_size
            if size == self._file.size and self._sum_of(existing).hexdigest() == self._expected:
                return True
        finally:
            os.close(existing)
        os.unlink(self._name, dir_fd=self._folder)
        self._meter.take_back(min(size, self._file.size))
        return False

    @property
    def _expected(self) -> str:
        return self._file.sha256 or self._file.blob_id

    def _new_sum(self) -> hashlib._Hash:
        if self._file.sha256:
            return hashlib.sha256()
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % self._file.size)
        return digest

    def _sum_of(self, descriptor: int) -> hashlib._Hash:
        """Return the sum of what a file contains: SHA-256, or git's blob id."""
        digest, offset = self._new_sum(), 0
        while piece := os.pread(descriptor, PIECE_BYTES, offset):
            if self._stop.is_set():
                raise Stopped
            digest.update(piece)
            offset += len(piece)
        return digest

    def _attempt(self, part: int) -> None:
        """Receive what is missing, and check the sum. Raises HubError."""
        self._size = os.fstat(part).st_size
        tag = self._tag()
        if self._size > self._file.size or (self._size and not tag):
            self._discard(part)
        if self._digest is None:
            self._digest = self._sum_of(part)
        if self._size < self._file.size:
            self._request(part, tag)
        found = self._digest.hexdigest()
        if found != self._expected:
            self._discard(part)
            self._mismatches += 1
            raise HubError(
                f"{self._what} has a wrong sum: {found}, the listing says {self._expected}",
                is_transient=self._mismatches == 1,  # a proxy or a disk may have changed a bit
            )

    def _request(self, part: int, tag: str) -> None:
        headers = {"range": f"bytes={self._size}-", "if-range": tag} if self._size else {}
        try:
            response = self._client.open(
                self._client.file_path(self._listing, self._file.path), self._listing.repository, headers
            )
        except HubError as error:
            if error.status == 416:  # the part and the file disagree
                self._discard(part)
                error.is_transient = True
            raise
        with response:
            self._check_response(response)
            if response.status == 200 and self._size:  # the file behind the tag has changed, or no Range is supported
                self._discard(part)
            if not self._size:
                self._keep_tag(response.header("etag"))
            self._write(part, response)

    def _check_response(self, response: Response) -> None:
        """Raise HubError if the response is not for the file of the listing, or begins at another byte."""
        linked = response.linked.get("x-linked-etag", "").removeprefix("W/").strip('"')
        if linked and self._file.sha256 and linked != self._file.sha256:
            raise HubError(f"{self._what}: the hub sends the file {linked[:64]!r}, the listing says {self._expected}")
        size = response.linked.get("x-linked-size", "")
        if size and size != str(self._file.size):
            raise HubError(f"{self._what}: the hub sends {size[:20]!r} bytes, the listing says {self._file.size}")
        begin = self._size if response.status == 206 else 0
        if response.status == 206:
            found = _CONTENT_RANGE.fullmatch(response.header("content-range"))
            if not found or int(found[1]) != self._size or found[2] not in ("*", str(self._file.size)):
                shown = response.header("content-range")[:60]
                raise HubError(f"{self._what}: Content-Range is {shown!r}, asked for bytes from {self._size}")
        if response.length is not None and begin + response.length != self._file.size:
            raise HubError(
                f"{self._what}: the hub sends {begin + response.length} bytes, the listing says {self._file.size}"
            )

    def _write(self, part: int, response: Response) -> None:
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                piece = response.read(PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise HubError(f"{self._what}: the connection broke: {error}", is_transient=True) from None
            if not piece:
                break
            if self._size + len(piece) > self._file.size:
                raise HubError(f"{self._what}: the hub sends more than the {self._file.size} bytes of the listing")
            _write_all(part, piece, self._size)
            if self._digest is not None:
                self._digest.update(piece)
            self._size += len(piece)
            self._furthest = max(self._furthest, self._size)
            self._meter.add(len(piece))
        if self._size < self._file.size:
            raise HubError(
                f"{self._what}: the connection ended after {self._size} of {self._file.size} bytes", is_transient=True
            )

    def _discard(self, part: int) -> None:
        """Begin the file again."""
        self._meter.take_back(min(self._size, self._file.size))
        os.ftruncate(part, 0)
        self._size, self._digest = 0, self._new_sum()

    def _tag(self) -> str:
        """Return the tag of the response that the part is from; "" if there is none that can be compared."""
        try:
            descriptor = open_regular(f"{self._name}.etag", os.O_RDONLY, self._folder)
        except FileNotFoundError:
            return ""
        with os.fdopen(descriptor, "rb") as stream:
            tag = stream.read(MAX_ETAG_CHARS + 1).decode("ascii", errors="replace")
        return tag if _STRONG_TAG.fullmatch(tag) else ""

    def _keep_tag(self, tag: str) -> None:
        """Write the tag before the first byte of the part. A weak one cannot be used with If-Range."""
        if not _STRONG_TAG.fullmatch(tag):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._name}.etag", dir_fd=self._folder)
            return
        descriptor = open_regular(f"{self._name}.etag", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self._folder)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(tag.encode("ascii"))


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset. Raises OSError; with ENOSPC, the disk is full."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, offset = view[count:], offset + count
