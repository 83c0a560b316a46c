"""What an actor yields to the bridge: records of bytes, one kind each. The first byte is the kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    "status_record",
]

LINES = b"L"  # reports of the worker, as lines of wire.codec
FILL = b"F"  # id of a storage, then the bytes of a picture for it
STATUS = b"S"  # JSON object: node, clock, pid, resident, memory, machine
LOG = b"G"  # what the worker has written to standard error
EXIT = b"X"  # JSON object: reason; the last record
STORAGE_CHARS = 24  # of an id that the front end's spool gives


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


def decode_json(data: bytes) -> dict[str, Any]:
    """Return the object of a status, of an exit, or of a packet between bridge and front end. Raises LinkGarbage."""
    try:
        values = json.loads(data)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise LinkGarbage(f"not an object: {data[:80]!r}")
    return values
