"""Result files: one JSON file for each run of a benchmark, with every measured value.

All values are kept, not only a summary, so that other percentiles and ratios can be computed later. Pages and plots are
made from these files only.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import metadata, stats

__all__ = ["DIRECTORY", "Case", "Result", "Series", "read_result"]

DIRECTORY = Path(__file__).resolve().parent / "results"
SCHEMA = 1
DIGITS = 6  # significant digits of a stored value
BETTER = ("higher", "lower", "none")

Case = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one figure in one case.

    Attributes:
        name: the figure, such as `throughput`.
        case: the conditions, such as `{"server": "ovserve", "clients": 8}`. Name and case identify a series.
        unit: of the values: `s`, `1/s`, `bytes`, `B/s`; empty for a pure number.
        better: higher, lower, or none for a figure that is only reported.
        values: one for each run, or one for each request of all runs.
    """

    name: str
    case: dict[str, str | int | float]
    unit: str
    better: str
    values: tuple[float, ...]

    @property
    def key(self) -> str:
        """Name and case as one text: the same series in two files has the same key."""
        return self.name + "".join(f" {key}={value}" for key, value in sorted(self.case.items()))

    def matches(self, case: Case) -> bool:
        """Return whether every entry of `case` is in this series' case."""
        return all(self.case.get(key) == value for key, value in case.items())


@dataclass(slots=True)
class Result:
    """One run of one benchmark: metadata, and series in the order in which they were added."""

    name: str
    metadata: dict[str, Any] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)

    def add(
        self, name: str, values: Iterable[float], *, unit: str = "s", better: str = "lower", case: Case | None = None
    ) -> None:
        """Add values of a figure; values for a known name and case are appended to its series.

        Raises:
            ValueError: `better` is not one of BETTER.
        """
        if better not in BETTER:
            raise ValueError(f"better is {better!r}; it must be one of {', '.join(BETTER)}")
        kept = tuple(float(f"{value:.{DIGITS}g}") for value in values)
        added = Series(name, dict(case or {}), unit, better, kept)
        for index, known in enumerate(self.series):
            if known.key == added.key:
                self.series[index] = Series(name, known.case, unit, better, known.values + kept)
                return
        self.series.append(added)

    def find(self, name: str, **case: str | float) -> Series:
        """Return the only series of this name whose case has these entries.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = [series for series in self.series if series.name == name and series.matches(case)]
        if len(found) != 1:
            raise KeyError(f"{self.name}: {len(found)} series of {name} with {case}")
        return found[0]

    def select(self, name: str, **case: str | float) -> list[Series]:
        """Return all series of this name whose case has these entries."""
        return [series for series in self.series if series.name == name and series.matches(case)]

    def save(self, path: Path | None = None) -> Path:
        """Write the file, by default `results/DATE-SHA-NAME.json`, and return its path."""
        if not self.metadata:
            self.metadata = metadata.collect()
        if path is None:
            day = dt.date.fromisoformat(str(self.metadata["date"])[:10]).isoformat()
            path = DIRECTORY / f"{day}-{self.metadata['commit']}-{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_encode(self), "utf-8")
        return path

    def report(self) -> str:
        """Return a table for the terminal: median with interval, and warnings, for each series."""
        width = max((len(series.key) for series in self.series), default=0)
        lines = []
        for series in self.series:
            if series.values:
                warnings = "; ".join(stats.warnings_of(series.values, series.unit))
                lines.append(
                    f"{series.key:<{width}}  {stats.estimate(series.values)} {series.unit}"
                    f"  n={len(series.values)}{'  ! ' + warnings if warnings else ''}"
                )
        return "\n".join(lines)


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        ValueError: it is not a result file, or has another schema.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"{path.name}: schema {document['schema']}, expected {SCHEMA}")
        series = [
            Series(row["name"], row["case"], row["unit"], row["better"], tuple(row["values"]))
            for row in document["series"]
        ]
        return Result(document["name"], document["metadata"], series)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not a result file: {error!r}") from error


def _encode(result: Result) -> str:
    """Return JSON with one series per line, so that a diff of two files is readable."""
    rows = [
        json.dumps(
            {
                "name": series.name,
                "case": series.case,
                "unit": series.unit,
                "better": series.better,
                "median": _median(series.values),
                "warnings": stats.warnings_of(series.values, series.unit),
                "values": series.values,
            }
        )
        for series in result.series
    ]
    head = json.dumps({"schema": SCHEMA, "name": result.name, "metadata": result.metadata}, indent=1)
    return head.removesuffix("\n}") + ',\n "series": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def _median(values: Sequence[float]) -> float | None:
    return float(f"{stats.percentile(values, 50):.{DIGITS}g}") if values else None
