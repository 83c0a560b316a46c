"""Contents that are read in windows: the bytes of the whole, bounded windows, sources that fail."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ovserve.api.windows import WINDOW_BYTES, Base64Windows, FileWindows

SOURCE = random.Random(15).randbytes(2 * WINDOW_BYTES + 8)
ENCODED_WINDOW = WINDOW_BYTES // 4 * 3  # bytes of the source in one window of base64
EDGES = [*range(8), *(edge + step for edge in (ENCODED_WINDOW, 2 * ENCODED_WINDOW) for step in range(-4, 5))]


def pieces(data: bytes, limit: int) -> Base64Windows:
    """Return the data in base64, from a source that returns at most `limit` bytes at once."""
    return Base64Windows(lambda offset, size: data[offset : offset + min(size, limit)], len(data))


@pytest.mark.parametrize("size", EDGES)
def test_windows_of_base64_are_the_base64_of_the_whole(size: int) -> None:
    data = SOURCE[:size]
    content = pieces(data, len(SOURCE))
    windows = list(content.windows())
    assert b"".join(windows) == base64.b64encode(data)
    assert len(content) == sum(map(len, windows))
    assert all(0 < len(window) <= WINDOW_BYTES for window in windows)


@example(size=0, limit=1)
@given(size=st.integers(0, 2 * ENCODED_WINDOW + 4), limit=st.integers(20_000, WINDOW_BYTES))
def test_source_that_returns_less_than_requested_is_read_whole(size: int, limit: int) -> None:
    content = pieces(SOURCE[:size], limit)
    assert b"".join(content.windows()) == base64.b64encode(SOURCE[:size])
    assert len(content) == len(base64.b64encode(SOURCE[:size]))


def test_content_is_read_again_from_its_beginning() -> None:
    content = pieces(SOURCE[:10], 10)
    assert list(content.windows()) == list(content.windows())


@pytest.mark.parametrize("start", [0, 1, WINDOW_BYTES])
@pytest.mark.parametrize("size", [0, 1, WINDOW_BYTES - 1, WINDOW_BYTES, WINDOW_BYTES + 1])
def test_windows_of_a_file_are_its_bytes(tmp_path: Path, start: int, size: int) -> None:
    (tmp_path / "f").write_bytes(SOURCE)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        content = FileWindows(descriptor, start, start + size)
        windows = list(content.windows())
        assert b"".join(windows) == SOURCE[start : start + size]
        assert len(content) == size
        assert all(0 < len(window) <= WINDOW_BYTES for window in windows)
    finally:
        os.close(descriptor)


def test_source_that_has_become_shorter_raises_os_error(tmp_path: Path) -> None:
    short = Base64Windows(lambda offset, size: SOURCE[offset : min(offset + size, 5)], 7)
    with pytest.raises(OSError, match="the source ends at byte 5; 7 were expected"):
        list(short.windows())
    (tmp_path / "f").write_bytes(bytes(WINDOW_BYTES))
    descriptor = os.open(tmp_path / "f", os.O_RDWR)
    try:
        windows = FileWindows(descriptor, 0, WINDOW_BYTES + 1).windows()
        assert len(next(windows)) == WINDOW_BYTES
        with pytest.raises(OSError, match="the source ends"):
            next(windows)
    finally:
        os.close(descriptor)
