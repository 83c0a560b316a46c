"""A fingerprint of the files of a model's directory: it changes when a file is replaced, added or removed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ovserve.models.plans import PLAN_FILE

__all__ = ["fingerprint"]

_MAX_FILES = 10_000  # a model has a few dozen; more is not a model's directory alone


def fingerprint(directory: Path, cache_dir: Path | None = None, further: Sequence[Path] = ()) -> str:
    """Return a hash over the names, sizes and modification times of a model's files; contents are not read.

    `further` are files outside the directory that belong to the model, such as its adapters. Hidden files and
    directories are left out, and so is `cache_dir` where it lies inside the directory: the server itself writes there.
    The stored plan is left out too: it is part of the profile where it is used, and nothing depends on it elsewhere.
    A missing or unreadable directory has an empty fingerprint.
    """
    digest = hashlib.sha256()
    try:
        for count, (name, found) in enumerate(_files(directory, cache_dir)):
            if count == _MAX_FILES:
                break
            digest.update(_described(name, found))
        for path in further:
            digest.update(_described(str(path), os.stat(path)))
    except OSError:
        return ""
    return digest.hexdigest()


def _described(name: str, found: os.stat_result) -> bytes:
    return f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape")


def _files(directory: Path, cache_dir: Path | None) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files in a fixed order, by their path below the directory. Raises OSError."""
    excluded = os.path.realpath(cache_dir) if cache_dir else ""
    for folder, folders, names in os.walk(directory, onerror=_raise):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) != excluded
        )
        for name in sorted(names):
            path = os.path.join(folder, name)
            below = os.path.relpath(path, directory)
            if not name.startswith(".") and below != PLAN_FILE:
                yield below, os.stat(path)


def _raise(error: OSError) -> None:
    raise error
