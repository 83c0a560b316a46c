"""Makes docs/performance.md and its plots from the newest result file of each benchmark; nothing on that page is typed.

    python -m benchmarks.render

What the figures mean, and why an aim is missed, stands in benchmarks/notes.md, by the names of the sections and aims below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stats
from benchmarks.aims import OURS as FIRST
from benchmarks.aims import list_aims, one
from benchmarks.plot import Point, line_chart
from benchmarks.results import DIRECTORY, Result, Series, read_result

__all__ = ["NOTES", "PAGE", "PLOTS", "main", "newest", "render"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
NOTES = ROOT / "benchmarks" / "notes.md"
OURS = "ovserve"  # the beginning of the names of our servers
UNITS = {"s": (1000.0, "ms"), "bytes": (1 / (1 << 20), "MiB"), "B/s": (1e-9, "GB/s"), "1/s": (1.0, "/s")}
MOST_ROWS = 60  # of a table of everything


def newest(directory: Path = DIRECTORY) -> dict[str, tuple[Path, Result]]:
    """The newest file of each benchmark, by the date in its metadata.

    A model that it left out is taken from the newest file that has it, which its metadata then name under `taken_from`: what takes
    half an hour for a large model need not be repeated for each change of the small one.
    """
    files = [(path, read_result(path)) for path in directory.glob("*.json")]
    found: dict[str, tuple[Path, Result]] = {}
    for path, result in sorted(files, key=lambda file: (str(file[1].metadata.get("date")), file[0]), reverse=True):
        if result.name not in found:
            found[result.name] = (path, result)
            continue
        newer = found[result.name][1]
        models = {series.case.get("model") for series in newer.series} | {None}
        if others := [series for series in result.series if series.case.get("model") not in models]:
            newer.series += others
            newer.metadata.setdefault("taken_from", []).append((path.name, result.metadata))
    return found


def render(files: dict[str, tuple[Path, Result]], notes: str) -> tuple[str, dict[str, str]]:
    """The page, and its plots by file name."""
    remarks = read_notes(notes)
    plots: dict[str, str] = {}
    lines = [
        "# Performance",
        "",
        "Made by `python -m benchmarks.render` from the files in benchmarks/results; do not edit. How it is measured, and how to",
        "repeat it: [benchmarks/README.md](../benchmarks/README.md). Intervals in brackets are 95 % bootstrap intervals of the median",
        "(for fewer than six values, the whole range).",
        "",
        *_machine(files),
        *_busy(files),
        *remarks.get("summary", []),
    ]
    if "serving" in files:
        serving = files["serving"][1]
        lines += _section("Aims", _aims(serving), remarks)
        for title, make in SECTIONS:
            lines += _section(title, make(serving, plots), remarks)
    for name, (_, result) in sorted(files.items()):
        if name != "serving":
            lines += _section(f"Benchmark: {name}", everything(result), remarks)
    lines += _section("Not measured", [], remarks)
    return "\n".join(lines).rstrip() + "\n", plots


def read_notes(text: str) -> dict[str, list[str]]:
    """Paragraphs under `## NAME` headings."""
    found: dict[str, list[str]] = {}
    for part in text.split("\n## ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [*body.strip().split("\n"), ""]
    return found


def _section(title: str, content: list[str], remarks: dict[str, list[str]]) -> list[str]:
    note = remarks.get(title, [])
    return [f"## {title}", "", *content, *note] if content or note else []


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, and an empty line; nothing for no rows."""
    if not rows:
        return []
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _provenance(told: dict[str, Any]) -> list[str]:
    before = (
        f"{told['cores_in_use']:g} cores in use" if "cores_in_use" in told else f"load average {told.get('load_1min')}"
    )
    load = f"{before}{', **not idle**' if told.get('busy') else ''}"
    return [str(told.get("date")), str(told.get("commit")), load]


def _machine(files: dict[str, tuple[Path, Result]]) -> list[str]:
    rows = []
    for name, (path, result) in sorted(files.items()):
        rows.append([name, path.name, *_provenance(result.metadata)])
        taken = result.metadata.get("taken_from", [])
        rows += [[f"{name}, other models", file_name, *_provenance(told)] for file_name, told in taken]
    if not rows:
        return []
    told = next(iter(sorted(files.items())))[1][1].metadata
    packages = ", ".join(f"{name} {version}" for name, version in told.get("packages", {}).items())
    memory = f"{told.get('memory_bytes', 0) / (1 << 30):.0f} GiB"
    processor = f"{told.get('cpu')}, {told.get('cores')} cores, {memory}, frequency governor: {told.get('governor')}"
    versions = f"Linux {told.get('kernel')}, Python {told.get('python')}, {packages}"
    return [
        f"Machine: {processor}; {versions}.",
        "",
        *table(["benchmark", "file", "date (UTC)", "commit", "just before"], rows),
    ]


def _busy(files: dict[str, tuple[Path, Result]]) -> list[str]:
    """The warning that other work ran during a measurement."""
    names = [name for name, (_, result) in sorted(files.items()) if result.metadata.get("busy")]
    if not names:
        return []
    return [
        f"**The machine was not known to be idle** before {', '.join(names)}: where other work takes part of the cores, times are",
        "longer than they would be, intervals wider, and ratios doubtful where the table says so. Workers of ovserve run at a lower",
        "priority than ordinary processes, as the peers do not, so that other work takes more from ovserve than from them.",
        "",
    ]


# --- figures ---


def shown(series: Series | None, rank: float = 50.0) -> str:
    """A percentile with its interval, in the unit a reader wants."""
    if series is None or not series.values:
        return ""
    factor, unit = UNITS.get(series.unit, (1.0, series.unit))
    estimate = stats.estimate([factor * value for value in series.values], rank)
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}] {unit}".rstrip()


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _servers(result: Result, **case: str | float) -> list[str]:
    """Servers in the order of the page: ours, then the peers."""
    names = {str(series.case["server"]) for series in result.series if series.matches(case) and "server" in series.case}
    return sorted(names, key=lambda name: (not name.startswith(OURS), name))


def _aims(result: Result) -> list[str]:
    rows = []
    for aim in list_aims(result):
        found = "not measured" if aim.found is None else f"{aim.found} {aim.unit}".rstrip()
        rows.append([aim.name, aim.wanted, found, aim.verdict])
    return table(["aim", "wanted", "measured", "verdict"], rows)


# --- sections ---

Plots = dict[str, str]


def closed(result: Result, plots: Plots) -> list[str]:
    """Closed loops on the built-in model."""
    counts = sorted({int(s.case["clients"]) for s in result.select("throughput", workload="closed")})
    lines = []
    floor = one(result, "bare throughput", model="builtin")
    rows = [["bare pipeline in a loop", shown(floor), *[""] * (len(counts) - 1)]] if floor else []
    names = _servers(result, workload="closed")
    rows += [
        [name, *(shown(one(result, "throughput", server=name, workload="closed", clients=k)) for k in counts)]
        for name in names
    ]
    heads = [f"{k} client{'s' if k > 1 else ''}" for k in counts]
    lines += ["Edits a second:", "", *table(["server", *heads], rows)]
    for title, figure, rank in (
        ("Latency, median", "latency", 50.0),
        ("Latency, p99", "latency", 99.0),
        ("Health check, p99", "health check", 99.0),
        ("CPU time of all processes for one edit", "cpu", 50.0),
        ("Memory of all processes", "memory", 50.0),
    ):
        rows = [
            [name, *(shown(one(result, figure, server=name, workload="closed", clients=k), rank) for k in counts)]
            for name in names
        ]
        lines += [f"{title}:", "", *table(["server", *heads], rows)]
    lines += _chart(
        result,
        plots,
        "clients",
        "throughput",
        "clients",
        "Edits a second by clients",
        "edits a second",
        {"workload": "closed"},
    )
    return lines if counts else []


def open_loops(result: Result, _: Plots) -> list[str]:
    """Open loops."""
    rows = []
    for name in _servers(result, workload="open"):
        for percent in sorted({int(s.case["percent"]) for s in result.select("latency", workload="open", server=name)}):
            case: dict[str, str | float] = {"server": name, "workload": "open", "percent": percent}
            latency = one(result, "latency", **case)
            failed = one(result, "not answered", **case)
            rows.append(
                [
                    name,
                    f"{percent} %",
                    shown(one(result, "arrival rate", **case)).partition(" ")[0],
                    shown(latency),
                    shown(latency, 99),
                    shown(one(result, "health check", **case), 99),
                    _total(failed),
                ]
            )
    return table(
        [
            "server",
            "of its capacity",
            "arrivals a second",
            "latency, median",
            "latency, p99",
            "health check, p99",
            "not answered",
        ],
        rows,
    )


def _total(series: Series | None) -> str:
    return f"{sum(series.values):g}" if series else "0"


def mixed(result: Result, _: Plots) -> list[str]:
    """Short beside long, masks, clients that go away."""
    works = (
        "short alone",
        "short beside long",
        "long beside short",
        "one step alone",
        "one step after a client has gone",
        "half with masks",
    )
    rows = [
        [name, work, shown(latency), shown(latency, 99), str(len(latency.values))]
        for work in works
        for name in _servers(result, workload=work)
        if (latency := one(result, "latency", server=name, workload=work))
    ]
    return table(["server", "request", "latency, median", "latency, p99", "answers"], rows)


def curves(result: Result, plots: Plots) -> list[str]:
    """Cost curves."""
    lines = []
    for label, title in (
        ("n", "pictures in one request"),
        ("steps", "denoising steps"),
        ("upload_bytes", "bytes of the upload"),
        ("side_px", "side of the result in pixels"),
        ("queue length", "requests sent at once"),
        ("replicas", "worker processes"),
        ("resident models", "models resident"),
    ):
        found = [s for s in result.series if s.case.get("curve") == label]
        rows = []
        for name in dict.fromkeys(str(s.case["server"]) for s in found):
            for value in sorted({int(s.case[label]) for s in found if s.case["server"] == name}):
                case: dict[str, str | float] = {"server": name, "curve": label, label: value}
                rows.append(
                    [name, f"{value}", shown(one(result, "latency", **case)), shown(one(result, "memory", **case))]
                )
        lines += table(["server", title, "latency, median", "memory"], rows)
        if any(s.name == "latency" for s in found):
            lines += _chart(
                result,
                plots,
                label,
                "latency",
                label,
                f"Latency by {title}",
                "milliseconds",
                {"curve": label},
                log=True,
            )
    sides = sorted({int(s.case["side_px"]) for s in result.select("latency", model="sd15", steps=1)})
    rows = [
        [str(side), shown(one(result, "latency", model="sd15", steps=1, side_px=side, server=FIRST))] for side in sides
    ]
    return [*lines, *table(["side in pixels, full-size SD 1.5, one step", "latency, median"], rows)]


def _chart(
    result: Result,
    plots: Plots,
    file: str,
    figure: str,
    label: str,
    title: str,
    y_label: str,
    case: dict[str, str | float],
    *,
    log: bool = False,
) -> list[str]:
    drawn: dict[str, list[Point]] = {}
    for series in result.select(figure, **case):
        if label in series.case and series.values:
            factor = UNITS.get(series.unit, (1.0, ""))[0]
            found = stats.estimate([factor * value for value in series.values])
            drawn.setdefault(str(series.case["server"]), []).append(
                Point(float(series.case[label]), found.value, found.low, found.high)
            )
    if not drawn:
        return []
    name = f"{file.replace(' ', '-')}.svg"
    plots[name] = line_chart(
        title,
        label,
        y_label,
        dict(sorted(drawn.items(), key=lambda item: (not item[0].startswith(OURS), item[0]))),
        log_x=True,
        log_y=log,
    )
    return [f"![{title}](plots/{name})", ""]


def starts(result: Result, _: Plots) -> list[str]:
    """Start-up."""
    names = {"none": "no cache", "cold": "cache, first start", "warm": "cache, second start"}
    rows = [
        [
            str(s.case["model"]),
            str(s.case["server"]),
            names[str(s.case["cache"])],
            shown(s),
            shown(one(result, "start to first answer", **s.case)),
        ]
        for s in result.select("start to ready")
    ]
    return table(
        ["model", "server", "compiled models", "to ready", "to the first answer"],
        sorted(rows, key=lambda row: (row[0], not row[1].startswith(OURS), row[1], row[2])),
    )


def full_size(result: Result, _: Plots) -> list[str]:
    """Full-size Stable Diffusion 1.5."""
    rows = [
        ["bare pipeline in a loop", "1", str(s.case["side_px"]), str(s.case["steps"]), "high", shown(s), "", ""]
        for s in result.select("bare edit", model="sd15")
    ]
    for s in result.select("latency", model="sd15"):
        throughput, memory = (one(result, figure, **s.case) for figure in ("throughput", "memory"))
        rows.append(
            [
                str(s.case["server"]),
                *(str(s.case[key]) for key in ("clients", "side_px", "steps", "quality")),
                shown(s),
                shown(throughput),
                shown(memory),
            ]
        )
    rows.sort(
        key=lambda row: (
            int(row[2]),
            int(row[3]),
            row[4] != "high",
            int(row[1]),
            not row[0].startswith(("bare", OURS)),
            row[0],
        )
    )
    return table(
        ["server", "clients", "side, px", "steps", "quality", "latency, median", "edits a second", "memory"], rows
    )


SECTIONS: tuple[tuple[str, Callable[[Result, Plots], list[str]]], ...] = (
    ("Closed loops: one model, k clients", closed),
    ("Open loops: a fixed arrival rate", open_loops),
    ("Who waits for whom", mixed),
    ("Cost curves", curves),
    ("Start-up", starts),
    ("Full-size Stable Diffusion 1.5", full_size),
)


def everything(result: Result) -> list[str]:
    """Every series of a benchmark as one table."""
    keys = list(dict.fromkeys(key for series in result.series for key in series.case))
    rows = [
        [series.name, *(str(series.case.get(key, "")) for key in keys), shown(series), str(len(series.values))]
        for series in result.series[:MOST_ROWS]
        if series.values
    ]
    left = len(result.series) - MOST_ROWS
    more = [f"{left} more series are in the file.", ""] if left > 0 else []
    return [*table(["figure", *keys, "median", "values"], rows), *more]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its plots."""
    del argv
    page, plots = render(newest(), NOTES.read_text("utf-8"))
    PAGE.write_text(page, "utf-8")
    PLOTS.mkdir(exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    for name, drawn in plots.items():
        (PLOTS / name).write_text(drawn, "utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
