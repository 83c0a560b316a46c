"""One message as one line of JSON, and back.

- A line has at most MESSAGE_BYTES, so that a write to the pipe is whole or not at all (pipe(7), PIPE_BUF).
- Nothing is ever unpickled. A line that is no message of ours raises LinkGarbage.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ovserve.errors import LinkGarbage
from ovserve.wire.messages import (
    Cancel,
    Done,
    Failed,
    Grant,
    Heartbeat,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Stop,
)

__all__ = ["MESSAGE_BYTES", "LineBuffer", "decode", "encode"]

MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write up to this size is atomic

_KINDS: dict[str, type[Any]] = {
    m.kind: m for m in (Run, Cancel, Grant, Stop, Ready, Heartbeat, Prepared, Progress, Need, Picture, Done, Failed)
}
# JSON gives exactly these types: a bool is no int here.
_TYPES: dict[str, frozenset[type]] = {
    "str": frozenset({str}),
    "int": frozenset({int}),
    "float": frozenset({int, float}),
    "bool": frozenset({bool}),
    "dict[str, Any]": frozenset({dict}),
}
_FIELDS = {kind: {f.name: _TYPES[str(f.type)] for f in dataclasses.fields(m)} for kind, m in _KINDS.items()}
_NUMBERS = frozenset({int, float})
_LARGEST = 1e15  # no duration in milliseconds and no size in bytes of ours comes near it


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def encode(message: Message) -> bytes:
    """One message as one line. Raises ValueError when it is longer than a pipe takes whole: a bug of the sender."""
    values: dict[str, object] = {"kind": message.kind}
    for name in _FIELDS[message.kind]:
        values[name] = getattr(message, name)
    line = _ENCODER.encode(values).encode() + b"\n"
    if len(line) > MESSAGE_BYTES:
        raise ValueError(f"message {message.kind!r} has {len(line)} bytes, more than {MESSAGE_BYTES}")
    return line


def decode(line: bytes) -> Message:
    """One line as a message, every field checked for its type. Raises LinkGarbage."""
    try:
        values = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):  # the second: thousands of open brackets
        raise LinkGarbage(f"no JSON: {line[:80]!r}") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    wanted = _FIELDS.get(kind) if isinstance(kind, str) else None
    if wanted is None:
        raise LinkGarbage(f"no message: {line[:80]!r}")
    for name, value in values.items():
        given = type(value)
        if given not in wanted.get(name, ()):
            raise LinkGarbage(f"message {kind!r}: {name[:80]} is {given.__name__}")
        if given in _NUMBERS and not -_LARGEST <= value <= _LARGEST:  # 1e999 reads as infinity, 10**400 fits no float
            raise LinkGarbage(f"message {kind!r}: {name} is out of range")
    try:
        message: Message = _KINDS[str(kind)](**values)
    except TypeError as error:
        raise LinkGarbage(f"message {kind!r}: {error}") from None
    return message


class LineBuffer:
    """Bytes in, whole lines out; never holds more than one message's worth of an unfinished line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= MESSAGE_BYTES or any(len(line) >= MESSAGE_BYTES for line in lines):  # the newline counts
            raise LinkGarbage(f"a line of more than {MESSAGE_BYTES} bytes")
        return lines
