"""Percentiles with intervals, ratios of two samples, and warnings about unstable samples.

Times are compared by percentiles, not by means, because a mean hides rare slow requests. Intervals are 95 % percentile
bootstrap intervals with a fixed seed, so that equal results always give the same page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Ratio", "estimate", "percentile", "ratio", "warnings_of"]

CONFIDENCE = 0.95
RESAMPLES = 2000  # so that 50 resamples lie beyond each end of a 95 % interval
SEED = 20261122
MIN_VALUES_FOR_BOOTSTRAP = 6  # with fewer values resampling understates the spread: the interval is the whole range
MAX_CELLS = 4_000_000  # of one block of resamples: 32 MB

# A sample is unstable beyond these limits (pyperf's thresholds, applied to quartiles because ours are medians).
SPREAD_LIMIT = 0.10  # interquartile range, as a part of the median
EXTREME_LIMIT = 0.50  # distance of a value from the median, as a part of the median
MIN_VALUES = 3
MIN_DURATION_S = 0.001  # shorter runs are dominated by noise of the clock and the operating system's scheduler


@dataclass(frozen=True, slots=True)
class Estimate:
    """A percentile of a sample with its interval, and the number of values."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A percentile of one sample over that of another, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def percentile(values: Sequence[float], rank: float) -> float:
    """Return the value below which `rank` percent (0..100) of a sample lie, interpolated.

    Raises:
        ValueError: the sample is empty.
    """
    if not values:
        raise ValueError("no values")
    return float(np.percentile(np.asarray(values, dtype=np.float64), rank))


def estimate(values: Sequence[float], rank: float = 50.0) -> Estimate:
    """Return a percentile (default: the median) with its 95 % interval.

    Raises:
        ValueError: the sample is empty.
    """
    centre = percentile(values, rank)
    if len(values) < MIN_VALUES_FOR_BOOTSTRAP:
        return Estimate(centre, float(min(values)), float(max(values)), len(values))
    low, high = _interval(_resampled(values, rank, SEED))
    return Estimate(centre, low, high, len(values))


def ratio(numerator: Sequence[float], denominator: Sequence[float], rank: float = 50.0) -> Ratio:
    """Return a percentile of one sample over that of another, with its 95 % interval.

    Raises:
        ValueError: a sample is empty, or the baseline is zero.
    """
    below = percentile(denominator, rank)
    if below == 0:
        raise ValueError("the baseline is zero")
    value = percentile(numerator, rank) / below
    if min(len(numerator), len(denominator)) < MIN_VALUES_FOR_BOOTSTRAP:
        lowest, highest = min(denominator), max(denominator)
        if lowest <= 0:
            raise ValueError("the baseline is zero or below")
        return Ratio(value, min(numerator) / highest, max(numerator) / lowest)
    divided = _resampled(numerator, rank, SEED) / _resampled(denominator, rank, SEED + 1)
    low, high = _interval(divided)
    return Ratio(value, low, high)


def warnings_of(values: Sequence[float], unit: str = "") -> list[str]:
    """Return the reasons why a sample is unreliable; empty for a stable one."""
    if len(values) < MIN_VALUES:
        return [f"only {len(values)} value(s): the spread is unknown"]
    warnings: list[str] = []
    centre = percentile(values, 50)
    if centre <= 0:
        return warnings
    spread = percentile(values, 75) - percentile(values, 25)
    if spread > SPREAD_LIMIT * centre:
        warnings.append(f"unstable: the middle half spreads over {spread / centre:.0%} of the median")
    furthest = max(abs(value - centre) for value in values)
    if furthest > EXTREME_LIMIT * centre:
        warnings.append(f"unstable: one value is {furthest / centre:.0%} of the median away from it")
    if unit == "s" and centre < MIN_DURATION_S:
        warnings.append("too short: below 1 ms; repeat the work within one value")
    return warnings


def _resampled(values: Sequence[float], rank: float, seed: int) -> NDArray[np.float64]:
    """Return the percentile of each of RESAMPLES resamples, drawn with replacement, in blocks to bound memory."""
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, MAX_CELLS // len(sample)))
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
