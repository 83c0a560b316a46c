"""The reader of safetensors files: what it accepts, and that any bytes are read or refused with a documented error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovserve.engines.lora import safetensors as module
from ovserve.engines.lora.safetensors import MAX_HEADER_BYTES, read_tensors
from ovserve.errors import ModelError
from tests.loras import safetensors

A = np.arange(6, dtype=np.float32).reshape(2, 3)


def read(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    return read_tensors(path)


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def test_reads_every_float_type_and_integers(tmp_path: Path) -> None:
    tensors = {
        "f32": A,
        "f16": A.astype(np.float16),
        "f64": A.astype(np.float64),
        "bf16": (A.view(np.uint32) >> 16).astype(np.uint16),
        "i64": A.astype(np.int64),
        "scalar": np.array(3.0, np.float32),
    }
    found = read(tmp_path, safetensors(tensors, {"format": "pt"}))
    assert found.metadata == {"format": "pt"}
    assert found.tensors["f16"].dtype == np.float16
    for name in ("f32", "f64", "bf16", "i64"):
        assert found.tensors[name].dtype == np.float32
        assert np.array_equal(found.tensors[name], A)
    assert found.tensors["scalar"].shape == ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "at most"),
        ((100).to_bytes(8, "little") + b"{}", "only 2 follow"),
        (b"\xff" * 16, "at most"),
        (with_header(b"[]"), "not a JSON object"),
        (with_header(b"{"), "not JSON"),
        (with_header(b"\xff"), "not JSON"),
        (with_header(b"[" * 100_000), "not JSON"),
        (with_header(b'{"a": NaN}'), "NaN"),
        (with_header(b'{"a": 1, "a": 2}'), "occurs twice"),
        (with_header({"__metadata__": {"a": 1}}), "__metadata__"),
        (with_header({"__metadata__": []}), "__metadata__"),
        (with_header({"": entry()}, b"1234"), "1 to"),
        (with_header({"a": []}), "its entry"),
        (with_header({"a": entry(more=1)}, b"1234"), "its entry"),
        (with_header({"a": entry(dtype="F1")}, b"1234"), "unknown dtype"),
        (with_header({"a": entry(dtype=["F32"])}, b"1234"), "unknown dtype"),
        (with_header({"a": entry(shape=[-1])}, b"1234"), "shape"),
        (with_header({"a": entry(shape=[True])}, b"1234"), "shape"),
        (with_header({"a": entry(shape=[1.0])}, b"1234"), "shape"),
        (with_header({"a": entry(shape=[1] * 9)}, b"1234"), "shape"),
        (with_header({"a": entry(shape=[2])}, b"1234"), "need 8"),
        (with_header({"a": entry(shape=[1 << 30] * 8)}, b"1234"), "need"),
        (with_header({"a": entry(data_offsets=[4, 0])}, b"1234"), "data_offsets"),
        (with_header({"a": entry(data_offsets=[0])}, b"1234"), "data_offsets"),
        (with_header({"a": entry(data_offsets=[4, 8])}, b"12345678"), "begins at byte"),
        (with_header({"a": entry()}, b"12345"), "has"),
        (with_header({"a": entry()}, b"123"), "has"),
        (with_header({"a": entry(), "b": entry()}, b"1234"), "begins at byte"),
        (with_header({"a": entry(dtype="I8", shape=[4])}, b"1234"), "not supported"),
        (with_header({"a": entry()}, np.array([np.inf], np.float32).tobytes()), "infinities"),
        (with_header({"a": entry(dtype="F64", data_offsets=[0, 8])}, np.array([1e300]).tobytes()), "infinities"),
    ],
)
def test_invalid_file_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=r"a\.safetensors") as caught:
        read(tmp_path, data)
    assert reason in str(caught.value)


def test_limits_hold_at_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENSORS", 2)
    data = {name: np.zeros(0, np.float32) for name in "ab"}
    assert len(read(tmp_path, safetensors(data)).tensors) == 2
    with pytest.raises(ModelError, match="3 tensors; at most 2"):
        read(tmp_path, safetensors({**data, "c": np.zeros(0, np.float32)}))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    with pytest.raises(ModelError, match="at most 10"):
        read(tmp_path, bytes(11))


def test_missing_file_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_tensors(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelError, match="is not a file"):
        read_tensors(tmp_path / "pipe.safetensors")


VALID = safetensors({"a": A, "b": np.zeros((0, 2), np.float16)}, {"format": "pt"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)
FILES = (
    st.binary(max_size=200)
    | st.builds(
        lambda at, byte: VALID[:at] + byte + VALID[at + 1 :], st.integers(0, len(VALID) - 1), st.binary(max_size=2)
    )
    | st.builds(lambda end: VALID[:end], st.integers(0, len(VALID)))
    | st.builds(with_header, st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=3), st.binary(max_size=60))
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=FILES)
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    try:
        found = read(tmp_path, data)
    except ModelError:
        return
    assert all(np.isfinite(tensor).all() for tensor in found.tensors.values())
    header = int.from_bytes(data[:8], "little")
    stored = {"float16": 2, "float32": 4}
    assert all(tensor.dtype.name in stored for tensor in found.tensors.values())
    assert 8 + header <= len(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=4))
def test_written_tensors_are_read_back(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    shapes.pop("__metadata__", None)
    rng = np.random.default_rng(0)
    written = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found = read(tmp_path, safetensors(written)).tensors
    assert found.keys() == written.keys()
    assert all(np.array_equal(found[name], array) for name, array in written.items())
