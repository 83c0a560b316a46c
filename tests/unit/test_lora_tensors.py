"""The tensors of safetensors files: what is read, and that any bytes are read or refused with a documented error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovserve.engines.lora import tensors as module
from ovserve.engines.lora.tensors import read_tensors
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
        (b"", "header would take"),
        (with_header({"a": entry(dtype="I8", shape=[4])}, b"1234"), "'a' has the data type I8; expected F64"),
        (with_header({"a": entry()}, np.array([np.inf], np.float32).tobytes()), "'a' contains infinities"),
        (with_header({"a": entry()}, np.array([np.nan], np.float32).tobytes()), "'a' contains infinities"),
        (with_header({"a": entry(dtype="F64", data_offsets=[0, 8])}, np.array([1e300]).tobytes()), "infinities"),
        (with_header({"a": entry(shape=[2**50, 2**50, 0], data_offsets=[0, 0])}), "safetensors file"),
    ],
)
def test_invalid_file_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=r"a\.safetensors") as caught:
        read(tmp_path, data)
    assert reason in str(caught.value)


def test_file_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = safetensors({"a": A})
    monkeypatch.setattr(module, "MAX_FILE_BYTES", len(data))
    read(tmp_path, data)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", len(data) - 1)
    with pytest.raises(ModelError, match="at most"):
        read(tmp_path, data)


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
