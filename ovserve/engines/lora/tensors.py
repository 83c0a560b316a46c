"""Reads and writes tensors of safetensors files; their headers are checked in `ovserve.models.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ovserve.errors import ModelError, may_pass
from ovserve.models.safetensors import Tensor, parse_header

__all__ = ["MAX_FILE_BYTES", "TensorFile", "read_tensors", "safetensors"]

MAX_FILE_BYTES = 8 * 1024 * 1024 * 1024  # adapters of high rank for large transformers have 1 to 2 GB
_READ_AS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


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
        ModelError: the file cannot be read, is not a valid safetensors file, or has a tensor that is not finite or of
            another type than those above; the message names the file, and the tensor where one is wrong.
    """
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise ModelError(f"{path}: is not a file")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise ModelError(f"{path}: has {size} bytes; at most {MAX_FILE_BYTES} are allowed")
            header = parse_header(stream, size)
            tensors = {name: _read(stream, name, tensor) for name, tensor in header.tensors.items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", is_transient=may_pass(error)) from None
    except ValueError as error:
        raise ModelError(f"{path}: not a safetensors file: {error}") from None
    return TensorFile(tensors, header.metadata)


def safetensors(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Return a file of float32 tensors."""
    header, data, end = {}, [], 0
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + len(raw)]}
        data.append(raw)
        end += len(raw)
    encoded = json.dumps(header).encode()
    return b"".join((len(encoded).to_bytes(8, "little"), encoded, *data))


def _read(stream: BinaryIO, name: str, tensor: Tensor) -> NDArray[Any]:
    """Return one tensor. Raises ValueError."""
    shown = repr(name[:100])
    if tensor.dtype not in _READ_AS:
        raise ValueError(f"{shown} has the data type {tensor.dtype}; expected {', '.join(_READ_AS)}")
    stream.seek(tensor.begin)
    data = stream.read(tensor.end - tensor.begin)
    if len(data) != tensor.end - tensor.begin:
        raise ValueError(f"the file became shorter while {shown} was read")
    found = np.frombuffer(data, _READ_AS[tensor.dtype]).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # the upper half of a float32
        found = (found.astype(np.uint32) << 16).view(np.float32)
    elif tensor.dtype != "F16":
        with np.errstate(over="ignore"):  # the check below reports it
            found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"{shown} contains infinities or NaN")
    return found
