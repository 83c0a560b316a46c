"""A bounded cache of arrays, keyed by content: what it returns is what would have been computed."""

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
    """A key for the content of an image: its shape and bytes, hashed so that nobody finds two images with one key."""
    hashed = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=32)
    hashed.update(np.ascontiguousarray(pixels).data)
    return hashed.digest()


class ArrayCache:
    """Least recently used goes first once `limit_bytes` are held. Thread-safe: yes, one lock.

    Arrays are made read-only when they go in: everybody gets the same ones.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._entries: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Arrays | None:
        """The arrays put under `key`, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: Arrays) -> None:
        """Hold `arrays` under `key`; larger than the limit, they are not held."""
        for array in arrays:
            array.setflags(write=False)
        with self._lock:
            old = self._entries.pop(key, ())
            self._entries[key] = arrays
            self._held_bytes += _bytes(arrays) - _bytes(old)
            while self._held_bytes > self._limit_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._held_bytes -= _bytes(dropped)

    @property
    def held_bytes(self) -> int:
        """Bytes of all arrays held."""
        return self._held_bytes


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
