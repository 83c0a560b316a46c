"""A least-recently-used cache of arrays, bounded in bytes."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayCache", "digest", "entry_bytes"]

Arrays = tuple[NDArray[Any], ...]

# What an entry takes besides its key and the data of its arrays. Measured: 235 bytes with one array, 355 with two; the
# table may have twice the space that it needs.
ENTRY_BYTES = 200
ARRAY_BYTES = 120


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """Return a key for an image: a cryptographic hash of shape and bytes, so that no client can force a collision."""
    hashed = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=32)
    hashed.update(np.ascontiguousarray(pixels).data)
    return hashed.digest()


class ArrayCache:
    """Holds at most `limit_bytes`, keys included; evicts the least recently used entries first.

    Keys count because they may be prompts, which may be longer than their arrays. Thread-safe: yes, one lock.

    Invariant: stored arrays are read-only, because all callers share them.

    Attributes:
        hits, misses: calls of `find`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.hits = self.misses = 0
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._entries: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Arrays | None:
        """Return the arrays stored under `key`, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: Arrays) -> None:
        """Store `arrays` under `key`. An entry larger than the limit is not stored."""
        for array in arrays:
            array.setflags(write=False)
        with self._lock:
            old = self._entries.pop(key, None)
            if old is not None:
                self._held_bytes -= entry_bytes(key, old)
            self._entries[key] = arrays
            self._held_bytes += entry_bytes(key, arrays)
            while self._held_bytes > self._limit_bytes:
                self._held_bytes -= entry_bytes(*self._entries.popitem(last=False))

    def raise_limit(self, limit_bytes: int) -> None:
        """Raise the limit to `limit_bytes` if it is lower."""
        with self._lock:
            self._limit_bytes = max(self._limit_bytes, limit_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of all entries."""
        return self._held_bytes


def entry_bytes(key: Hashable, arrays: Arrays) -> int:
    """Return how much memory an entry takes."""
    return ENTRY_BYTES + _key_bytes(key) + sum(array.nbytes + ARRAY_BYTES for array in arrays)


def _key_bytes(key: Hashable) -> int:
    parts = key if isinstance(key, tuple) else ()
    return sys.getsizeof(key) + sum(_key_bytes(part) for part in parts)
