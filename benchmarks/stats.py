"""Medians and tails with their uncertainty, ratios of two samples, and warnings about samples that cannot be trusted.

Times are judged by quantiles, never by means: one slow request in a hundred is what a user remembers, and a mean hides it.
Intervals are 95 % percentile bootstrap intervals, made with a fixed seed so that a page rendered twice is the same page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Ratio", "estimate", "percentile", "ratio", "warnings_of"]

CONFIDENCE = 0.95
RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 resamples each
SEED = 20261122
FEWEST_FOR_BOOTSTRAP = 6  # below, resampling invents certainty: the interval is the whole range
MOST_CELLS = 4_000_000  # of one block of resamples: 32 MB

# When a sample is called unstable (the thresholds of pyperf, taken to quartiles because ours are medians).
SPREAD_LIMIT = 0.10  # interquartile range beyond this part of the median
EXTREME_LIMIT = 0.50  # a value further from the median than this part of it
FEWEST_VALUES = 3
SHORTEST_S = 0.001  # a run shorter than this is made of clock and scheduler noise


@dataclass(frozen=True, slots=True)
class Estimate:
    """A quantile of a sample with its interval, and how many values it rests on."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of one sample over the median of another, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def percentile(values: Sequence[float], rank: float) -> float:
    """The value below which `rank` percent (0..100) of a sample lie, interpolated. Raises ValueError for an empty sample."""
    if not values:
        raise ValueError("no values")
    return float(np.percentile(np.asarray(values, dtype=np.float64), rank))


def estimate(values: Sequence[float], rank: float = 50.0) -> Estimate:
    """A percentile (default: the median) and its 95 % interval. Raises ValueError for an empty sample."""
    centre = percentile(values, rank)
    if len(values) < FEWEST_FOR_BOOTSTRAP:
        return Estimate(centre, float(min(values)), float(max(values)), len(values))
    low, high = _interval(_resampled(values, rank, SEED))
    return Estimate(centre, low, high, len(values))


def ratio(numerator: Sequence[float], denominator: Sequence[float], rank: float = 50.0) -> Ratio:
    """A percentile of one sample over that of another, and the 95 % interval. Raises ValueError when a sample is empty or zero."""
    below = percentile(denominator, rank)
    if below == 0:
        raise ValueError("the baseline is zero")
    value = percentile(numerator, rank) / below
    if min(len(numerator), len(denominator)) < FEWEST_FOR_BOOTSTRAP:
        lowest, highest = min(denominator), max(denominator)
        if lowest <= 0:
            raise ValueError("the baseline is zero or below")
        return Ratio(value, min(numerator) / highest, max(numerator) / lowest)
    divided = _resampled(numerator, rank, SEED) / _resampled(denominator, rank, SEED + 1)
    low, high = _interval(divided)
    return Ratio(value, low, high)


def warnings_of(values: Sequence[float], unit: str = "") -> list[str]:
    """What makes a sample doubtful, in words; empty for a steady one."""
    if len(values) < FEWEST_VALUES:
        return [f"only {len(values)} value(s): no spread can be told"]
    found: list[str] = []
    centre = percentile(values, 50)
    if centre <= 0:
        return found
    spread = percentile(values, 75) - percentile(values, 25)
    if spread > SPREAD_LIMIT * centre:
        found.append(f"unstable: the middle half spreads over {spread / centre:.0%} of the median")
    furthest = max(abs(value - centre) for value in values)
    if furthest > EXTREME_LIMIT * centre:
        found.append(f"unstable: one value is {furthest / centre:.0%} of the median away from it")
    if unit == "s" and centre < SHORTEST_S:
        found.append("too short: below 1 ms, repeat the work inside one value")
    return found


def _resampled(values: Sequence[float], rank: float, seed: int) -> NDArray[np.float64]:
    """The percentile of each of RESAMPLES resamples, drawn with replacement; in blocks, so that memory stays bounded."""
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, MOST_CELLS // len(sample)))
    blocks = []
    left = RESAMPLES
    while left > 0:
        count = min(rows, left)
        drawn = sample[generator.integers(0, len(sample), size=(count, len(sample)))]
        blocks.append(np.percentile(drawn, rank, axis=1))
        left -= count
    return np.concatenate(blocks)


def _interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)
