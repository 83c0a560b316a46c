"""The listing of a repository: names, sizes and sums of its files, each checked before anything uses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.errors import HubError

__all__ = ["Listing", "RemoteFile", "check_path", "check_repository", "check_revision", "parse_listing"]

MAX_FILES = 20_000
MAX_FILE_BYTES = 1 << 40
MAX_PATH_CHARS = 512
MAX_DEPTH = 8
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_BLOB_ID = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        path: relative, with `/`, checked by `check_path`.
        size: in bytes.
        sha256: of its content, for files in large-file storage; else "".
        blob_id: git's id of its content, for the others; else "".
    """

    path: str
    size: int
    sha256: str
    blob_id: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit, by path."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]


def check_repository(name: str) -> str:
    """Return the name of a repository, `OWNER/NAME` or `NAME`. Raises ValueError."""
    if not _REPOSITORY.fullmatch(name) or ".." in name or name.endswith((".git", ".")):
        raise ValueError("expected OWNER/NAME of letters, digits and ._-")
    return name


def check_revision(name: str) -> str:
    """Return the name of a branch, tag or commit. Raises ValueError."""
    if not _REVISION.fullmatch(name) or ".." in name or "//" in name or name.endswith(("/", ".")):
        raise ValueError("expected a branch, a tag or a commit")
    return name


def check_path(path: str) -> str:
    """Return a path of a listing that stays inside the target directory on every system. Raises ValueError."""
    if not path or len(path) > MAX_PATH_CHARS:
        raise ValueError(f"its length is {len(path)}; expected 1 to {MAX_PATH_CHARS}")
    if not path.isprintable() or "\\" in path:
        raise ValueError("it contains a backslash or a control character")
    if path.startswith("/") or _DRIVE.match(path):
        raise ValueError("it is absolute")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("it contains an empty part, . or ..")
    if len(parts) > MAX_DEPTH or any(len(part.encode()) > 200 for part in parts):
        raise ValueError("it is too deep, or a part of it is too long")
    return path


def parse_listing(document: Any, repository: str) -> Listing:
    """Parse the hub's description of a repository at one revision.

    Raises:
        HubError: it has another form, an unsafe path, a path twice, or too many files.
    """
    if not isinstance(document, dict):
        raise HubError(f"{repository}: the hub's listing is no JSON object")
    commit, entries = document.get("sha"), document.get("siblings")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise HubError(f"{repository}: the hub's listing names no commit")
    if not isinstance(entries, list) or len(entries) > MAX_FILES:
        raise HubError(f"{repository}: the hub's listing has no list of at most {MAX_FILES} files")
    files: dict[str, RemoteFile] = {}
    for entry in entries:
        file = _parse_file(entry, repository)
        # Names that differ only in case are one file on some file systems.
        if file.path.casefold() in files:
            raise HubError(f"{repository}: the hub lists {file.path!r} twice")
        files[file.path.casefold()] = file
    return Listing(repository, commit, {file.path: file for file in files.values()})


def _parse_file(entry: Any, repository: str) -> RemoteFile:
    path = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(path, str):
        raise HubError(f"{repository}: the hub lists a file without a name")
    shown = repr(path[:100])
    try:
        check_path(path)
    except ValueError as error:
        raise HubError(f"{repository}: the hub lists the unsafe path {shown}: {error}") from None
    stored = entry.get("lfs")
    stored = stored if isinstance(stored, dict) else {}
    size = stored.get("size", entry.get("size"))
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise HubError(f"{repository}: the hub lists {shown} without a valid size")
    sha256, blob_id = stored.get("sha256", ""), entry.get("blobId", "")
    return RemoteFile(
        path,
        size,
        sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else "",
        # The blob of a file in large-file storage is its pointer, not its content.
        blob_id if not stored and isinstance(blob_id, str) and _BLOB_ID.fullmatch(blob_id) else "",
    )
