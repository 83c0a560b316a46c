"""Extrapolate a figure of models with few blocks to a model with all of them, linearly in the number of each kind.

A transformer's blocks of one kind do the same work, so seconds and memory grow by the same amount with each. A model is
described by its `Blocks`, such as `{"double": 1, "single": 4}`. One model more than there are kinds gives one solution:
nothing is left to estimate an error from, so the result has no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import stats

__all__ = ["EXTRAPOLATED", "Blocks", "describe_blocks", "extrapolate", "pool"]

Blocks = Mapping[str, int]  # kind of block to how many of them
EXTRAPOLATED = "extrapolated"  # in place of the blocks of a model in a result, with those of the full one


def describe_blocks(blocks: Blocks) -> str:
    """Return blocks in words, for a table."""
    return ", ".join(f"{count} {kind}" for kind, count in blocks.items())


def pool(measured: Sequence[tuple[Blocks, Sequence[float]]], kinds: Sequence[str]) -> list[tuple[Blocks, float]]:
    """Return one median for each combination of the blocks of `kinds`; models that differ in others are put together.

    Args:
        measured: blocks of each model, and the values measured with it.
        kinds: those on which the figure depends.
    """
    pooled: dict[tuple[int, ...], list[float]] = {}
    for blocks, values in measured:
        pooled.setdefault(tuple(blocks[kind] for kind in kinds), []).extend(values)
    return [(dict(zip(kinds, counts, strict=True)), stats.percentile(values, 50)) for counts, values in pooled.items()]


def extrapolate(points: Sequence[tuple[Blocks, float]], full: Blocks) -> float:
    """Return the value at `full` of the linear function through the points.

    Args:
        points: blocks of each model, and its value; one more than there are kinds of blocks.
        full: the blocks of the full model; its kinds are those that count.

    Raises:
        ValueError: the points do not determine the function: too few, too many, or on one line.
    """
    if len(points) != len(full) + 1:
        raise ValueError(f"{len(points)} models for {len(full)} kinds of blocks; {len(full) + 1} are needed")
    counts = np.array([[1, *(blocks[kind] for kind in full)] for blocks, _ in points], np.float64)
    if np.linalg.matrix_rank(counts) < len(points):
        raise ValueError("no depth differs for one of the kinds of blocks alone: the models do not tell them apart")
    solved = np.linalg.solve(counts, [value for _, value in points])
    return float(solved @ [1, *full.values()])
