"""Render docs/performance.md and its plots from the newest result file of each benchmark.

    python -m benchmarks.render

No figure on that page is written by hand. Explanations, such as why an aim is missed, come from benchmarks/notes.md,
where each heading names a section of the page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stats
from benchmarks.aims import OURS as OUR_STEPWISE
from benchmarks.aims import find_only, list_aims
from benchmarks.extrapolate import EXTRAPOLATED
from benchmarks.plot import Point, line_chart
from benchmarks.results import DIRECTORY, Result, Series, read_result

__all__ = ["NOTES", "PAGE", "PLOTS", "main", "newest", "render"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
NOTES = ROOT / "benchmarks" / "notes.md"
OURS = "ovserve"  # prefix of our servers' names
UNITS = {"s": (1000.0, "ms"), "bytes": (1 / (1 << 20), "MiB"), "B/s": (1e-9, "GB/s"), "1/s": (1.0, "/s")}
LARGE_UNITS = {"s": (1.0, "s"), "bytes": (1 / (1 << 30), "GiB")}  # for models of full size
OUTSIDE = "outside the model's calls"  # a figure of the benchmark account
MAX_ROWS = 60  # of the table of a whole benchmark
# Texts of the page for names in the result files; names without an entry are shown as they are.
LABELS = {
    "any other answer": "other answers",
    "half with masks": "edits, half of them with a mask",
    "jobs given once more": "jobs requeued",
    "jobs with two deaths": "jobs that lost two workers",
    "not accepted": "connection refused or closed",
    "of": "count of",
    "one step after a client has gone": "one step after an abandoned request",
    "pictures that differ for one seed": "different pictures for one seed",
    "way": "transport",
}


def newest(directory: Path = DIRECTORY) -> dict[str, tuple[Path, Result]]:
    """Return path and content of the newest file of each benchmark, by the date in the metadata.

    Series of a model that this file does not have are added from the newest file that has them, and `taken_from` in the
    metadata names that file: a run of half an hour with a large model need not be repeated for each change to the small
    one.
    """
    files = [(path, read_result(path)) for path in directory.glob("*.json")]
    newest_files: dict[str, tuple[Path, Result]] = {}
    for path, result in sorted(files, key=lambda file: (str(file[1].metadata.get("date")), file[0]), reverse=True):
        if result.name not in newest_files:
            newest_files[result.name] = (path, result)
            continue
        newer = newest_files[result.name][1]
        models = {series.case.get("model") for series in newer.series} | {None}
        if others := [series for series in result.series if series.case.get("model") not in models]:
            newer.series += others
            newer.metadata.setdefault("taken_from", []).append((path.name, result.metadata))
    return newest_files


def render(files: dict[str, tuple[Path, Result]], notes: str) -> tuple[str, dict[str, str]]:
    """Return the page, and its plots by file name."""
    sections = read_notes(notes)
    plots: dict[str, str] = {}
    lines = [
        "# Performance",
        "",
        "Made by `python -m benchmarks.render` from the files in benchmarks/results; do not edit. Method and commands:",
        "[benchmarks/README.md](../benchmarks/README.md). Intervals in brackets are 95 % bootstrap intervals of the",
        "percentile (for fewer than six values, the whole range).",
        "",
        *_machine(files),
        *_busy(files),
        *sections.get("summary", []),
    ]
    if "serving" in files:
        serving = files["serving"][1]
        lines += _section("Aims", _aims(serving), sections)
        for title, make in SECTIONS:
            lines += _section(title, make(serving, plots), sections)
    for name, (_, result) in sorted(files.items()):
        if name != "serving":
            lines += _section(f"Benchmark: {name}", TABLES.get(name, list_series)(result), sections)
    lines += _section("Not measured", [], sections)
    return "\n".join(lines).rstrip() + "\n", plots


def read_notes(text: str) -> dict[str, list[str]]:
    """Return the lines under each `## NAME` heading, by name."""
    sections: dict[str, list[str]] = {}
    for part in text.split("\n## ")[1:]:
        name, _, body = part.partition("\n")
        sections[name.strip()] = [*body.strip().split("\n"), ""]
    return sections


def _section(title: str, content: list[str], notes: dict[str, list[str]]) -> list[str]:
    note = notes.get(title, [])
    return [f"## {title}", "", *content, *note] if content or note else []


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table and an empty line; nothing if there are no rows."""
    if not rows:
        return []
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _provenance(recorded: dict[str, Any]) -> list[str]:
    in_use = recorded.get("cores_in_use")
    load = f"load average {recorded.get('load_1min')}" if in_use is None else f"{in_use:g} cores in use"
    warning = ", **not idle**" if recorded.get("busy") else ""
    return [str(recorded.get("date")), str(recorded.get("commit")), load + warning]


def _machine(files: dict[str, tuple[Path, Result]]) -> list[str]:
    rows = []
    for name, (path, result) in sorted(files.items()):
        rows.append([name, path.name, *_provenance(result.metadata)])
        taken = result.metadata.get("taken_from", [])
        rows += [[f"{name}, other models", file_name, *_provenance(recorded)] for file_name, recorded in taken]
    if not rows:
        return []
    first = next(iter(sorted(files.items())))[1][1].metadata
    packages = ", ".join(f"{name} {version}" for name, version in first.get("packages", {}).items())
    memory = f"{first.get('memory_bytes', 0) / (1 << 30):.0f} GiB"
    processor = f"{first.get('cpu')}, {first.get('cores')} cores, {memory}, frequency governor: {first.get('governor')}"
    versions = f"Linux {first.get('kernel')}, Python {first.get('python')}, {packages}"
    return [
        f"Machine: {processor}; {versions}.",
        "",
        *table(["benchmark", "file", "date (UTC)", "commit", "load before the run"], rows),
    ]


def _busy(files: dict[str, tuple[Path, Result]]) -> list[str]:
    """Return the warning that other work ran on the machine, or nothing."""
    names = [name for name, (_, result) in sorted(files.items()) if result.metadata.get("busy")]
    if not names:
        return []
    return [
        f"**The machine was not idle** before {', '.join(names)}. Other work makes times longer, intervals wider and",
        "ratios less reliable. It slows ovserve more than the peers, because only the workers of ovserve run at a",
        "lower priority than ordinary processes.",
        "",
    ]


# --- figures ---


def shown(series: Series | None, rank: float = 50.0, units: Mapping[str, tuple[float, str]] = UNITS) -> str:
    """Return a percentile with its interval, in the unit of the page; empty if it was not measured."""
    if series is None or not series.values:
        return ""
    factor, unit = units.get(series.unit, (1.0, series.unit))
    if str(series.case.get("blocks", "")).startswith(EXTRAPOLATED):  # from medians: there is no interval
        return f"{_number(factor * series.values[0])} {unit}".rstrip()
    estimate = stats.estimate([factor * value for value in series.values], rank)
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}] {unit}".rstrip()


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _servers(result: Result, **case: str | float) -> list[str]:
    """Return the names of the measured servers: ours, then the peers."""
    names = {str(series.case["server"]) for series in result.series if series.matches(case) and "server" in series.case}
    return sorted(names, key=lambda name: (not name.startswith(OURS), name))


def _aims(result: Result) -> list[str]:
    rows = []
    for aim in list_aims(result):
        measured = "not measured" if aim.measured is None else f"{aim.measured} {aim.unit}".rstrip()
        rows.append([aim.name, aim.bound_text, measured, aim.verdict])
    return table(["aim", "bound", "measured", "verdict"], rows)


# --- sections ---

Plots = dict[str, str]


def closed(result: Result, plots: Plots) -> list[str]:
    """Return the section on closed loops with the built-in model."""
    counts = sorted({int(s.case["clients"]) for s in result.select("throughput", workload="closed")})
    lines = []
    bare = find_only(result, "bare throughput", model="builtin")
    rows = [["bare pipeline in a loop", shown(bare), *[""] * (len(counts) - 1)]] if bare else []
    names = _servers(result, workload="closed")
    rows += [
        [name, *(shown(find_only(result, "throughput", server=name, workload="closed", clients=k)) for k in counts)]
        for name in names
    ]
    heads = [f"{k} client{'s' if k > 1 else ''}" for k in counts]
    lines += ["Edits per second:", "", *table(["server", *heads], rows)]
    for title, figure, rank in (
        ("Latency, median", "latency", 50.0),
        ("Latency, p99", "latency", 99.0),
        ("Health check, p99", "health check", 99.0),
        ("CPU time of all processes per edit", "cpu", 50.0),
        ("Memory of all processes", "memory", 50.0),
    ):
        rows = [
            [name, *(shown(find_only(result, figure, server=name, workload="closed", clients=k), rank) for k in counts)]
            for name in names
        ]
        lines += [f"{title}:", "", *table(["server", *heads], rows)]
    lines += _chart(
        result,
        plots,
        "clients",
        "throughput",
        "clients",
        "Edits per second by clients",
        "edits per second",
        {"workload": "closed"},
    )
    return lines if counts else []


def lone(result: Result, _: Plots) -> list[str]:
    """Return the section on one client by number of steps."""
    counts = sorted({int(s.case["steps"]) for s in result.select("latency", workload="one client")})
    rows = []
    for name in ("", *_servers(result, workload="one client")):
        found = [
            find_only(result, "latency", server=name, workload="one client", steps=steps)
            if name
            else find_only(result, "bare edit", workload="one client", steps=steps)
            for steps in counts
        ]
        rows.append([name or "bare pipeline in a loop", *map(shown, found)])
    return table(["server", *(f"{steps} steps" for steps in counts)], rows) if counts else []


def open_loops(result: Result, _: Plots) -> list[str]:
    """Return the section on open loops."""
    rows = []
    for name in _servers(result, workload="open"):
        for percent in sorted({int(s.case["percent"]) for s in result.select("latency", workload="open", server=name)}):
            case: dict[str, str | float] = {"server": name, "workload": "open", "percent": percent}
            latency = find_only(result, "latency", **case)
            failed = find_only(result, "not answered", **case)
            rows.append(
                [
                    name,
                    f"{percent} %",
                    shown(find_only(result, "arrival rate", **case)).partition(" ")[0],
                    shown(latency),
                    shown(latency, 99),
                    shown(find_only(result, "health check", **case), 99),
                    _total(failed),
                ]
            )
    return table(
        [
            "server",
            "rate / capacity",
            "arrivals per second",
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
    """Return the section on mixed loads: short and long jobs, masks, abandoned requests."""
    works = (
        "short alone",
        "short beside long",
        "long beside short",
        "one step alone",
        "one step after a client has gone",
        "half with masks",
    )
    rows = [
        [name, LABELS.get(work, work), shown(latency), shown(latency, 99), str(len(latency.values))]
        for work in works
        for name in _servers(result, workload=work)
        if (latency := find_only(result, "latency", server=name, workload=work))
    ]
    return table(["server", "request", "latency, median", "latency, p99", "answers"], rows)


def curves(result: Result, plots: Plots) -> list[str]:
    """Return the section on cost curves."""
    lines = []
    for label, title in (
        ("n", "pictures in one request"),
        ("steps", "denoising steps"),
        ("upload_bytes", "bytes of the upload"),
        ("side_px", "side of the result in pixels"),
        ("queue length", "requests sent at once"),
        ("replicas", "worker processes"),
        ("resident models", "resident models"),
    ):
        found = [s for s in result.series if s.case.get("curve") == label]
        rows = []
        for name in dict.fromkeys(str(s.case["server"]) for s in found):
            for value in sorted({int(s.case[label]) for s in found if s.case["server"] == name}):
                case: dict[str, str | float] = {"server": name, "curve": label, label: value}
                rows.append(
                    [
                        name,
                        f"{value}",
                        shown(find_only(result, "latency", **case)),
                        shown(find_only(result, "memory", **case)),
                    ]
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
        [str(side), shown(find_only(result, "latency", model="sd15", steps=1, side_px=side, server=OUR_STEPWISE))]
        for side in sides
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
    """Return the section on start-up."""
    names = {"none": "no cache", "cold": "cache, first start", "warm": "cache, second start"}
    rows = [
        [
            str(s.case["model"]),
            str(s.case["server"]),
            names[str(s.case["cache"])],
            shown(s),
            shown(find_only(result, "start to first answer", **s.case)),
        ]
        for s in result.select("start to ready")
    ]
    return table(
        ["model", "server", "compiled models", "to ready", "to the first answer"],
        sorted(rows, key=lambda row: (row[0], not row[1].startswith(OURS), row[1], row[2])),
    )


def full_size(result: Result, _: Plots) -> list[str]:
    """Return the section on full-size Stable Diffusion 1.5."""
    rows = [
        ["bare pipeline in a loop", "1", str(s.case["side_px"]), str(s.case["steps"]), "high", shown(s), "", ""]
        for s in result.select("bare edit", model="sd15")
    ]
    for s in result.select("latency", model="sd15"):
        throughput, memory = (find_only(result, figure, **s.case) for figure in ("throughput", "memory"))
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
        ["server", "clients", "side, px", "steps", "quality", "latency, median", "edits per second", "memory"], rows
    )


SECTIONS: tuple[tuple[str, Callable[[Result, Plots], list[str]]], ...] = (
    ("Closed loops: one model, k clients", closed),
    ("One client, by steps of the request", lone),
    ("Open loops: a fixed arrival rate", open_loops),
    ("Mixed loads", mixed),
    ("Cost curves", curves),
    ("Start-up", starts),
    ("Full-size Stable Diffusion 1.5", full_size),
)


def list_series(result: Result) -> list[str]:
    """Return a table of the first MAX_ROWS series of a benchmark."""
    keys = list(dict.fromkeys(key for series in result.series for key in series.case))
    rows = []
    for series in result.series[:MAX_ROWS]:
        if series.values:
            case = [str(series.case.get(key, "")) for key in keys]
            rows.append(
                [series.name, *(LABELS.get(text, text) for text in case), shown(series), str(len(series.values))]
            )
    left = len(result.series) - MAX_ROWS
    more = [f"{left} more series are in the file.", ""] if left > 0 else []
    return [*table(["figure", *(LABELS.get(key, key) for key in keys), "median", "values"], rows), *more]


def sizes(result: Result) -> list[str]:
    """Return the table of models of full size: one row for each model, its blocks, its weights and an engine.

    Extrapolated figures are in italics.
    """
    figures = ("step", "rest of an edit", "ready", "private memory", "step, int8 over fp16", "distance of the picture")
    cases = {tuple(sorted(series.case.items())): series.case for series in result.series}
    rows = []
    for case in cases.values():
        blocks = str(case.get("blocks", "all"))
        cells = []
        for figure in figures:
            found = [series for series in result.series if (series.name, series.case) == (figure, case)]
            cells.append(shown(found[0], units=LARGE_UNITS) if found else "")
        if blocks.startswith(EXTRAPOLATED):
            cells = [f"*{cell}*" if cell else "" for cell in cells]
            blocks = f"*{blocks}*"
        rows.append([str(case["model"]), blocks, *(str(case[key]) for key in ("weights", "side", "side_px")), *cells])
    order = {model: place for place, model in enumerate(dict.fromkeys(row[0] for row in rows))}
    rows.sort(key=lambda row: (order[row[0]], row[1].startswith("*")))  # the extrapolated rows of a model come last
    return table(["model", "blocks", "weights", "engine", "side, px", *figures], rows)


def account(result: Result) -> list[str]:
    """Return the CPU time of an edit by process and part, the largest first, for each number of clients."""
    clients = sorted({int(series.case["clients"]) for series in result.series})

    def milliseconds(name: str, **case: str | float) -> list[float]:
        found = [result.select(name, clients=count, **case) for count in clients]
        return [1000 * stats.percentile(series[0].values, 50) if series else 0.0 for series in found]

    parts = {(str(series.case["process"]), str(series.case["part"])) for series in result.select("cpu for an edit")}
    times = {key: milliseconds("cpu for an edit", process=key[0], part=key[1]) for key in parts}
    total = milliseconds("cpu for an edit, all")
    rows = [
        [*key, *_parts_of(found, total)]
        for key, found in sorted(times.items(), key=lambda item: (-item[1][-1], item[0]))
    ]
    outside = [shown(series[0]) for count in clients if (series := result.select(OUTSIDE, clients=count))]
    rows = [*rows, ["all", "", *_parts_of(total, total)], ["all", OUTSIDE, *outside]]
    return table(["process", "part", *(f"{count} client{'s' * (count > 1)}" for count in clients)], rows)


def _parts_of(found: Sequence[float], total: Sequence[float]) -> list[str]:
    return [f"{ms:.2f} ms, {ms / whole:.1%}" for ms, whole in zip(found, total, strict=True)]


# Others are shown by list_series.
TABLES: Mapping[str, Callable[[Result], list[str]]] = {"account": account, "sizes": sizes}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its plots, and return exit code 0."""
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
