"""A bounded least-recently-used cache of arrays."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayCache", "digest"]

Arrays = tuple[NDArray[Any], ...]


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """Return a key for an image: a cryptographic hash of shape and bytes, so that no client can force a collision."""
    hashed = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=32)
    hashed.update(np.ascontiguousarray(pixels).data)
    return hashed.digest()


class ArrayCache:
    """Holds at most `limit_bytes`; evicts the least recently used entries first. Thread-safe: yes, one lock.

    Invariant: stored arrays are read-only, because all callers share them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._entries: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Arrays | None:
        """Return the arrays stored under `key`, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: Arrays) -> None:
        """Store `arrays` under `key`. Arrays larger than the limit are not stored."""
        for array in arrays:
            array.setflags(write=False)
        with self._lock:
            old = self._entries.pop(key, ())
            self._entries[key] = arrays
            self._held_bytes += _bytes(arrays) - _bytes(old)
            while self._held_bytes > self._limit_bytes:
                _, evicted = self._entries.popitem(last=False)
                self._held_bytes -= _bytes(evicted)

    @property
    def held_bytes(self) -> int:
        """Bytes of all stored arrays."""
        return self._held_bytes


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
