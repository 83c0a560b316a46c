"""The header of safetensors files: what is read, and what is refused."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import ModelError
from ovserve.models.safetensors import MAX_HEADER_BYTES, Tensor, parse_header, read_header


def file_of(header: Any, data: bytes = b"") -> bytes:
    """Return a file of the format."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_header_gives_tensors_and_metadata(tmp_path: Path) -> None:
    header = {"b": tensor("F16", [3], [8, 14]), "a": tensor(), "__metadata__": {"format": "pt"}}
    content = file_of(header, bytes(14))
    (tmp_path / "x").write_bytes(content)
    found = read_header(tmp_path / "x")
    base = len(content) - 14
    assert found.tensors == {"a": Tensor("F32", (2,), base, base + 8), "b": Tensor("F16", (3,), base + 8, base + 14)}
    assert found.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "its header would take"),
        (b"\xff" * 8, "its header would take"),
        (file_of({"a": tensor()}), "end at byte"),
        (file_of({"a": tensor()}, bytes(9)), "end at byte"),
        (file_of({"a": tensor(), "b": tensor()}, bytes(8)), "begins at byte"),
        (file_of({"a": tensor(offsets=[4, 12])}, bytes(12)), "begins at byte"),
        (file_of({"a": tensor("pickle")}, bytes(8)), "data type"),
        (file_of({"a": tensor(shape=[-2])}, bytes(8)), "wrong shape"),
        (file_of({"a": tensor(shape=[1] * 9)}, bytes(8)), "wrong shape"),
        (file_of({"a": tensor(shape=[True])}, bytes(8)), "wrong shape"),
        (file_of({"a": tensor(shape=[3])}, bytes(8)), "do not fit its shape"),
        (file_of({"a": tensor(offsets=[8, 0])}, bytes(8)), "wrong data_offsets"),
        (file_of({"a": 1}, bytes(8)), "is not an object of"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
        (file_of([]), "no JSON object"),
        (file_of(b'{"a": {}, "a": {}}'), "a name occurs twice"),
        (file_of(b"[" * 100_000), "cannot be read"),
        (file_of(b"{}" + b" " * MAX_HEADER_BYTES), "at most"),
    ],
)  # fmt: skip
def test_wrong_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_header(tmp_path / "x")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_header(tmp_path / "missing")


@given(st.binary(max_size=200), st.binary(max_size=32))
def test_any_bytes_are_read_or_refused(header: bytes, data: bytes) -> None:
    content = file_of(header, data)
    try:
        found = parse_header(io.BytesIO(content), len(content))
    except ValueError:
        return
    assert sum(each.end - each.begin for each in found.tensors.values()) == len(data)
