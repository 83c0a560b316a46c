"""Encode messages as lines of JSON and decode them.

Invariants:
- A line has at most MESSAGE_BYTES bytes, so a write to the pipe is atomic (pipe(7), PIPE_BUF).
- Nothing is ever unpickled. A line that is not a valid message raises LinkGarbage.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ovserve.errors import LinkGarbage
from ovserve.wire.messages import (
    Cancel,
    Counts,
    Done,
    Failed,
    Grant,
    Heartbeat,
    LogLevel,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Span,
    Stop,
)

__all__ = ["MESSAGE_BYTES", "LineBuffer", "decode", "encode"]

MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write up to this size is atomic

_KINDS: dict[str, type[Any]] = {
    m.kind: m
    for m in (
        Run,
        Cancel,
        Grant,
        LogLevel,
        Stop,
        Ready,
        Heartbeat,
        Counts,
        Span,
        Prepared,
        Progress,
        Need,
        Picture,
        Done,
        Failed,
    )
}
# Types as JSON decodes them. They are compared exactly: a bool does not pass as an int.
_TYPES: dict[str, frozenset[type]] = {
    "str": frozenset({str}),
    "int": frozenset({int}),
    "float": frozenset({int, float}),
    "bool": frozenset({bool}),
    "dict[str, Any]": frozenset({dict}),
}
_FIELDS = {kind: {f.name: _TYPES[str(f.type)] for f in dataclasses.fields(m)} for kind, m in _KINDS.items()}
_NUMBERS = frozenset({int, float})
_MAX_NUMBER = 1e15  # far above every duration in milliseconds and every size in bytes that a message carries


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def encode(message: Message) -> bytes:
    """Encode one message as one line.

    Raises:
        ValueError: the line is longer than MESSAGE_BYTES, which is a bug of the sender.
    """
    values: dict[str, object] = {"kind": message.kind}
    for name in _FIELDS[message.kind]:
        values[name] = getattr(message, name)
    line = _ENCODER.encode(values).encode() + b"\n"
    if len(line) > MESSAGE_BYTES:
        raise ValueError(f"message {message.kind!r} has {len(line)} bytes; at most {MESSAGE_BYTES} are allowed")
    return line


def decode(line: bytes) -> Message:
    """Decode one line to a message and check the type of every field.

    Raises:
        LinkGarbage: the line is not JSON, the kind is unknown, or a field is missing, unknown, mistyped or out of
            range.
    """
    try:
        values = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):  # RecursionError: thousands of open brackets
        raise LinkGarbage(f"not valid JSON: {line[:80]!r}") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    field_types = _FIELDS.get(kind) if isinstance(kind, str) else None
    if field_types is None:
        raise LinkGarbage(f"not a message of a known kind: {line[:80]!r}")
    for name, value in values.items():
        value_type = type(value)
        if value_type not in field_types.get(name, ()):
            raise LinkGarbage(
                f"message {kind!r}: field {name[:80]!r} is unknown or may not be of type {value_type.__name__}"
            )
        # 1e999 is decoded as infinity; 10**400 does not fit into a float.
        if value_type in _NUMBERS and not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise LinkGarbage(f"message {kind!r}: field {name!r} exceeds ±{_MAX_NUMBER:g}")
    try:
        message: Message = _KINDS[str(kind)](**values)
    except TypeError as error:
        raise LinkGarbage(f"message {kind!r}: {error}") from None
    return message


class LineBuffer:
    """Splits received bytes into complete lines. Buffers at most MESSAGE_BYTES of an incomplete line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes and return the complete lines, without their newlines.

        Raises:
            LinkGarbage: a line, complete or not, is longer than MESSAGE_BYTES.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= MESSAGE_BYTES or any(len(line) >= MESSAGE_BYTES for line in lines):  # the newline counts
            raise LinkGarbage(f"a line has more than {MESSAGE_BYTES} bytes")
        return lines
