"""References to encoded bytes that cross the process boundary."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Blob"]


@dataclass(frozen=True, slots=True)
class Blob:
    """Reference to encoded bytes in a spool segment: `size` bytes from `offset` in the file at `path`."""

    path: str
    offset: int
    size: int
