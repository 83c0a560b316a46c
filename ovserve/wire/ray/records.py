"""What an actor yields to the bridge: items of one or more records. The first byte of a record is its kind.

An item costs about a millisecond, whatever is in it. So records that are ready together travel together.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from ovserve.errors import LinkGarbage

__all__ = [
    "EXIT",
    "FILL",
    "LINES",
    "LOG",
    "STATUS",
    "STORAGE_CHARS",
    "decode_json",
    "exit_record",
    "fill_record",
    "lines_record",
    "log_record",
    "pack",
    "status_record",
    "unpack",
]

LINES = b"L"  # reports of the worker, as lines of wire.codec
FILL = b"F"  # id of a storage, then the bytes of a picture for it
STATUS = b"S"  # JSON object: node, clock, pid, resident, memory, machine
LOG = b"G"  # what the worker has written to standard error
EXIT = b"X"  # JSON object: reason; the last record
STORAGE_CHARS = 24  # of an id that the front end's spool gives
_LENGTH = struct.Struct("<I")  # precedes each record of an item


def lines_record(lines: Iterable[bytes]) -> bytes:
    """Return the record of complete lines."""
    return LINES + b"".join(lines)


def fill_record(storage: str, data: bytes) -> bytes:
    """Return the record of a picture."""
    return FILL + storage.encode() + data


def log_record(data: bytes) -> bytes:
    """Return the record of log output."""
    return LOG + data


def status_record(**values: float | str) -> bytes:
    """Return the record of the worker's process: its id, its node and the clock there, its memory, its machine's."""
    return STATUS + json.dumps(values).encode()


def exit_record(reason: str) -> bytes:
    """Return the record of the worker's end."""
    return EXIT + json.dumps({"reason": reason}).encode()


def pack(records: Iterable[bytes]) -> bytes:
    """Return the item of these records."""
    return b"".join(piece for record in records for piece in (_LENGTH.pack(len(record)), record))


def unpack(item: bytes) -> Iterator[memoryview]:
    """Yield the records of an item. Raises LinkGarbage."""
    view, place = memoryview(item), 0
    while place < len(view):
        try:
            (length,) = _LENGTH.unpack_from(view, place)
        except struct.error:
            raise LinkGarbage("an item that ends within a length") from None
        place += _LENGTH.size + length
        if not length > 0 or place > len(view):
            raise LinkGarbage("an item that ends within a record")
        yield view[place - length : place]


def decode_json(data: bytes | memoryview) -> dict[str, Any]:
    """Return the object of a status, of an exit, or of a packet between bridge and front end. Raises LinkGarbage."""
    try:
        values = json.loads(bytes(data))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise LinkGarbage(f"not an object: {bytes(data[:80])!r}")
    return values
