"""The header of a safetensors file: read within bounds and checked, without the tensors' data.

Layout: 8 bytes with the header's length (little-endian), the header as a JSON object of tensor names to data type,
shape and byte range, then the data. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ovserve.errors import ModelError

__all__ = ["MAX_HEADER_BYTES", "SafetensorsHeader", "Tensor", "parse_header", "read_header"]

MAX_HEADER_BYTES = 32 * 1024 * 1024  # a header takes about 100 bytes for each tensor; the format allows 100 MB
MAX_TENSORS = 200_000
MAX_NAME_CHARS = 1024
MAX_DIMENSIONS = 8
_PREFIX_BYTES = 8
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        dtype: the format's name of the data type, such as F16.
        shape: sides, 0 or more.
        begin, end: byte range in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors by name, and the metadata: strings by name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a file. Raises ModelError; the message names the file."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            return parse_header(stream, size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not a safetensors file: {error}") from None


def parse_header(stream: BinaryIO, size: int) -> SafetensorsHeader:
    """Parse the header at the begin of a stream of `size` bytes.

    Raises:
        ValueError: the header is too long, no JSON object of this form, or its byte ranges do not tile the data.
    """
    prefix = stream.read(_PREFIX_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _PREFIX_BYTES or not 2 <= length <= size - _PREFIX_BYTES:
        raise ValueError(f"its header would take {length} of {size} bytes")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        document = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise ValueError("its header is no JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    if len(document) > MAX_TENSORS:
        raise ValueError(f"it has {len(document)} tensors; at most {MAX_TENSORS} are read")
    base = _PREFIX_BYTES + length
    tensors = {name: _parse_tensor(name, entry, base) for name, entry in document.items()}
    position = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise ValueError(f"the data of {name[:100]!r} begins at byte {tensor.begin}, expected {position}")
        position = tensor.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, the file at {size}")
    return SafetensorsHeader(tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _parse_tensor(name: str, entry: object, base: int) -> Tensor:
    """Return one tensor; `base` is where the data begins in the file. Raises ValueError."""
    shown = repr(name[:100])
    if len(name) > MAX_NAME_CHARS:
        raise ValueError(f"the name {shown}... has {len(name)} characters; at most {MAX_NAME_CHARS} are read")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{shown} has the data type {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{shown} has a wrong shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown} has wrong data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * _BITS[dtype] // 8:
        raise ValueError(f"{shown} has {offsets[1] - offsets[0]} bytes, which do not fit its shape {shape} of {dtype}")
    return Tensor(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_counts(value: object) -> bool:
    """Return whether a value is a list of whole numbers from 0 to 2^53."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**53 for item in value)
