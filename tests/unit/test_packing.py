"""Latents as tokens and back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ovserve.engines.families.packing import grid, pack, pack_mask, unpack

SIDES = st.integers(1, 6).map(lambda half: 2 * half)


@given(rows=st.integers(1, 3), channels=st.integers(1, 5), height=SIDES, width=SIDES)
def test_unpacking_returns_what_was_packed(rows: int, channels: int, height: int, width: int) -> None:
    latents = np.random.default_rng(0).standard_normal((rows, channels, height, width), np.float32)
    tokens = pack(latents)
    assert tokens.shape == (rows, height * width // 4, 4 * channels)
    np.testing.assert_array_equal(unpack(tokens, height, width), latents)


def test_channels_of_a_token_are_channel_row_column() -> None:
    latents = np.arange(2 * 4 * 4, dtype=np.float32).reshape(1, 2, 4, 4)
    assert pack(latents)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_mask_pixels_of_a_cell_are_channels_of_its_token() -> None:
    mask = np.zeros((32, 48), np.float32)
    mask[8:16, 16:24] = 1  # the cell in row 1, column 2: in the token of row 0, column 1
    mask[8, 16] = 0.5
    tokens = pack_mask(mask, 8)
    assert tokens.shape == (1, 6, 256)
    assert tokens[0, [0, 2, 3, 4, 5]].max() == 0
    channels = tokens[0, 1].reshape(64, 2, 2)  # pixel of a cell, row and column of the cell in the token
    assert channels[:, 1, 0].tolist() == [0.5] + [1] * 63
    assert channels[:, 0].max() == channels[:, 1, 1].max() == 0


def test_grid_counts_rows_and_columns() -> None:
    assert grid(10, 2, 3, 4).tolist() == [[10, row, column, 0] for row in range(2) for column in range(3)]
