"""Reads safetensors files: every length, offset and name is checked before a byte of a tensor is used.

    8 bytes: length n, little-endian │ n bytes: JSON header │ tensors, without gaps

The header maps each tensor's name to dtype, shape and offsets (https://github.com/huggingface/safetensors, Format).
Adapters come from strangers, so nothing in a file is executed or unpickled, and every size has a limit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ovserve.errors import ModelError, may_pass

__all__ = ["MAX_FILE_BYTES", "MAX_HEADER_BYTES", "MAX_TENSORS", "TensorFile", "read_tensors"]

MAX_HEADER_BYTES = 16 * 1024 * 1024  # the header of an adapter with 10,000 tensors takes about 1.5 MB
MAX_TENSORS = 50_000  # adapters of the largest transformers have some thousands
MAX_FILE_BYTES = 8 * 1024 * 1024 * 1024  # adapters of high rank for large transformers have 1 to 2 GB
MAX_NAME_CHARS = 1000
MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

# Bytes of one element. Float types can be read; the others are known so that their sizes can be checked.
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_READ_AS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The contents of one file.

    Attributes:
        tensors: each tensor by its name: float16 where the file has float16, else float32 (integers and float64 too).
        metadata: the texts under `__metadata__`.
    """

    tensors: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, str]


def read_tensors(path: Path) -> TensorFile:
    """Read a whole file.

    Raises:
        ModelError: the file cannot be read, or is not a valid safetensors file within the limits; the message names
            the file, and the tensor where one is wrong.
    """
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise ModelError(f"{path}: is not a file")
        with path.open("rb") as stream:
            return _read(stream)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", is_transient=may_pass(error)) from None
    except _Invalid as error:
        raise ModelError(f"{path}: not a valid safetensors file: {error}") from None


class _Invalid(ValueError):
    """The file breaks a rule of the format, or exceeds a limit."""


def _read(stream: BinaryIO) -> TensorFile:
    size = os.fstat(stream.fileno()).st_size
    if size > MAX_FILE_BYTES:
        raise _Invalid(f"it has {size} bytes; at most {MAX_FILE_BYTES} are allowed")
    if size < _LENGTH_BYTES:
        raise _Invalid(f"it has {size} bytes; the length of the header alone takes {_LENGTH_BYTES}")
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise _Invalid(f"its header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if length > size - _LENGTH_BYTES:
        raise _Invalid(f"its header has {length} bytes, but only {size - _LENGTH_BYTES} follow")
    header = _parse_header(stream.read(length))
    metadata = _metadata(header.pop(_METADATA, {}))
    if len(header) > MAX_TENSORS:
        raise _Invalid(f"it has {len(header)} tensors; at most {MAX_TENSORS} are allowed")
    data_begin = _LENGTH_BYTES + length
    places = {name: _place(name, entry, data_begin) for name, entry in header.items()}
    _check_no_gaps(places, data_begin, size)
    return TensorFile({name: _tensor(stream, name, place) for name, place in places.items()}, metadata)


def _parse_header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_reject)
    except _Invalid:
        raise
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number with thousands of digits, nested too deeply
        raise _Invalid("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _Invalid("its header is not a JSON object")
    return header


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Invalid("a name occurs twice in its header")
    return found


def _reject(word: str) -> None:
    raise _Invalid(f"its header contains {word}")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _Invalid(f"{_METADATA} is not an object of texts")
    return value


def _place(name: str, entry: Any, data_begin: int) -> _Place:
    """Return the place of one tensor after checking its entry in the header."""
    shown = repr(name[:100])
    if not name or len(name) > MAX_NAME_CHARS:
        raise _Invalid(f"tensor {shown}: a name must have 1 to {MAX_NAME_CHARS} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Invalid(f"tensor {shown}: its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _Invalid(f"tensor {shown}: unknown dtype {str(dtype)[:20]!r}")
    if not _are_sizes(shape, MAX_DIMENSIONS):
        raise _Invalid(f"tensor {shown}: the shape must be a list of at most {MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Invalid(f"tensor {shown}: data_offsets must be two offsets in ascending order")
    size = offsets[1] - offsets[0]
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if size != needed:
        raise _Invalid(f"tensor {shown}: has {size} bytes, but dtype and shape need {needed}")
    return _Place(dtype, tuple(shape), data_begin + offsets[0], size)


def _are_sizes(value: Any, most: int) -> bool:
    """Return whether a value is a list of at most `most` integers from 0 to MAX_FILE_BYTES."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(item) is int and 0 <= item <= MAX_FILE_BYTES for item in value)


def _check_no_gaps(places: Mapping[str, _Place], data_begin: int, size: int) -> None:
    """Check that the tensors fill the rest of the file, without gaps and without overlaps."""
    end = data_begin
    for name, place in sorted(places.items(), key=lambda entry: (entry[1].begin, entry[1].size)):
        if place.begin != end:
            raise _Invalid(f"tensor {name[:100]!r}: begins at byte {place.begin}; expected {end}")
        end += place.size
    if end != size:
        raise _Invalid(f"its tensors end at byte {end}, but the file has {size} bytes")


def _tensor(stream: BinaryIO, name: str, place: _Place) -> NDArray[Any]:
    if place.dtype not in _READ_AS:
        raise _Invalid(f"tensor {name[:100]!r}: dtype {place.dtype} is not supported; expected a float dtype")
    stream.seek(place.begin)
    data = stream.read(place.size)
    if len(data) != place.size:
        raise _Invalid(f"tensor {name[:100]!r}: the file became shorter while it was read")
    found = np.frombuffer(data, _READ_AS[place.dtype]).reshape(place.shape)
    if place.dtype == "BF16":  # the upper half of a float32
        found = (found.astype(np.uint32) << 16).view(np.float32)
    elif place.dtype != "F16":
        with np.errstate(over="ignore"):  # the check below reports it
            found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise _Invalid(f"tensor {name[:100]!r}: contains infinities or NaN")
    return found
