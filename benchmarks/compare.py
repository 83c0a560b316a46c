"""Compare two result files: print the ratio of each figure with its interval, and report regressions by the exit code.

    python -m benchmarks.compare OLD.json NEW.json [--threshold 0.05] [--name throughput]

A figure is worse when the whole interval of new / old lies beyond the threshold on the wrong side, so noise alone is no
regression. Exit codes: 0: no figure is worse; 1: at least one is worse; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import stats
from benchmarks.results import Result, Series, read_result

__all__ = ["Comparison", "compare", "main"]

THRESHOLD = 0.05  # smaller changes are not reported, even when they are certain
TAIL_RANK = 99.0
MIN_VALUES_FOR_TAIL = 500  # so that five values lie beyond the 99th percentile


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure in both files; `rank` is the compared percentile."""

    key: str
    unit: str
    better: str
    rank: float
    old: stats.Estimate
    new: stats.Estimate
    ratio: stats.Ratio
    threshold: float

    @property
    def verdict(self) -> str:
        """One of worse, better and same; empty for a figure without a direction."""
        if self.better == "none":
            return ""
        low, high = self.ratio.low, self.ratio.high
        above, below = low > 1 + self.threshold, high < 1 / (1 + self.threshold)
        if above or below:
            return "better" if above == (self.better == "higher") else "worse"
        return "same"


def compare(old: Result, new: Result, threshold: float = THRESHOLD, name: str = "") -> list[Comparison]:
    """Compare the medians of all figures that both files have, and 99th percentiles where there are enough values.

    Args:
        old: the baseline.
        new: the result to judge.
        threshold: relative change below which a figure counts as the same.
        name: only figures of this name; empty: all.
    """
    old_series = {series.key: series for series in old.series}
    comparisons = []
    for series in new.series:
        before = old_series.get(series.key)
        if before is None or (name and series.name != name) or not before.values or not series.values:
            continue
        ranks = [50.0]
        if min(len(before.values), len(series.values)) >= MIN_VALUES_FOR_TAIL:
            ranks.append(TAIL_RANK)
        comparisons += [
            _compare_at(before, series, rank, threshold) for rank in ranks if stats.percentile(before.values, rank) > 0
        ]
    return comparisons


def _compare_at(old: Series, new: Series, rank: float, threshold: float) -> Comparison:
    return Comparison(
        key=new.key,
        unit=new.unit,
        better=new.better,
        rank=rank,
        old=stats.estimate(old.values, rank),
        new=stats.estimate(new.values, rank),
        ratio=stats.ratio(new.values, old.values, rank),
        threshold=threshold,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="result file of the baseline")
    parser.add_argument("new", type=Path, help="result file to judge")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="smallest change that counts (%(default)s)")
    parser.add_argument("--name", default="", help="compare only this figure")
    options = parser.parse_args(argv)
    try:
        old, new = read_result(options.old), read_result(options.new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    comparisons = compare(old, new, options.threshold, options.name)
    if not comparisons:
        print("compare: the files have no figure in common", file=sys.stderr)
        return 2
    for note in _differences(old, new):
        print(f"! {note}")
    width = max(len(row.key) for row in comparisons)
    for row in comparisons:
        print(f"{row.key:<{width}}  p{row.rank:g}  {row.old} -> {row.new} {row.unit}  x{row.ratio}  {row.verdict}")
    for key in sorted({series.key for series in old.series} - {series.key for series in new.series}):
        print(f"! only in the old file: {key}")
    worse = [row.key for row in comparisons if row.verdict == "worse"]
    if worse:
        print(f"worse: {len(worse)} of {len(comparisons)}: {'; '.join(worse)}")
    return 1 if worse else 0


def _differences(old: Result, new: Result) -> list[str]:
    """Return notes on differences between the machines or their states that could explain a different figure."""
    keys = ("cpu", "cores", "governor", "kernel", "python", "packages", "model")
    notes = [
        f"{key} differs: {old.metadata.get(key)} (old), {new.metadata.get(key)} (new)"
        for key in keys
        if old.metadata.get(key) != new.metadata.get(key)
    ]
    notes += [
        f"the machine was busy before the {age} run"
        for age, result in (("old", old), ("new", new))
        if result.metadata.get("busy")
    ]
    return notes


if __name__ == "__main__":
    sys.exit(main())
