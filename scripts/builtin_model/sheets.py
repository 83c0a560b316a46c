"""Contact sheets: many small pictures in one, for visual inspection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["save_sheet"]

_EMPTY_LEVEL = 90


def save_sheet(path: Path, rows: Sequence[Sequence[npt.NDArray[np.uint8]]]) -> None:
    """Write rows of uint8 (H, W, 3) pictures of one size; shorter rows are filled with grey."""
    columns = max(len(row) for row in rows)
    empty = np.full_like(rows[0][0], _EMPTY_LEVEL)
    lines = [np.concatenate([*row, *[empty] * (columns - len(row))], axis=1) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(lines)).save(path)
