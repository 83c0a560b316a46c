"""Run commands, interleaved and each run in a fresh process, and record their figures; or run a set of benchmarks.

    python -m benchmarks.run --name imports numpy='python -c "import numpy"' pillow='python -c "import PIL.Image"'
    python -m benchmarks.run quick | full

Each run is a fresh process, because the conditions of a single process (memory layout, page cache, branch predictor)
would bias the figure. The first `--warm_ups` runs of each command are dropped. Commands are interleaved, each round in
another order, so that drift of the machine affects all of them. The value of a run is its wall time; or, if the last
line of its output is a JSON object {"series": {NAME: {"values": [...], "unit": ..., "better": ...}}}, the values in it.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import metadata
from benchmarks.results import Result

__all__ = ["RUN_TIMEOUT_S", "main", "run_commands", "run_once"]

ROOT = Path(__file__).resolve().parents[1]
RUN_TIMEOUT_S = 600.0
SET_TIMEOUT_S = 2400.0
SEED = 1

# The modules of each set with their arguments. Each compares ovserve with a baseline in the same run.
SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "quick": (
        ("bench_serving", "--set", "quick"),
        ("bench_multipart", "--rounds", "1", "--repetitions", "2", "--sizes", "1", "10", "--save"),
        ("bench_server", "--rounds", "1", "--seconds", "1", "--save"),
        ("bench_ipc", "--rounds", "1", "--save"),
    ),
    "full": (
        ("bench_serving", "--set", "full"),
        ("bench_multipart", "--rounds", "3", "--save"),
        ("bench_server", "--save"),
        ("bench_connections", "--save"),
        ("bench_ipc", "--save"),
        ("bench_recovery", "--save"),
        ("bench_shares", "--save"),
    ),
}


def run_commands(
    name: str,
    commands: Mapping[str, Sequence[str]],
    *,
    runs: int = 5,
    warm_ups: int = 1,
    timeout_s: float = RUN_TIMEOUT_S,
) -> Result:
    """Run each command several times, interleaved.

    Args:
        name: of the result.
        commands: label to argument vector; the label becomes `case["command"]`.
        runs: number of recorded runs of each command.
        warm_ups: number of dropped runs of each command.
        timeout_s: longest time of one run.

    Raises:
        RuntimeError: a run failed or took too long; its output is in the message.
    """
    result = Result(name, metadata.collect())
    rng = random.Random(SEED)
    for turn in range(warm_ups + runs):
        order = list(commands)
        rng.shuffle(order)
        for label in order:
            series = run_once(commands[label], timeout_s)
            if turn >= warm_ups:
                for figure, row in series.items():
                    result.add(
                        figure,
                        row["values"],
                        unit=row.get("unit", "s"),
                        better=row.get("better", "lower"),
                        case={"command": label},
                    )
    return result


def run_once(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run a command once.

    Returns:
        Name of a figure to {"values": [...]}, with "unit" and "better" where they are not "s" and "lower".

    Raises:
        RuntimeError: the command failed or took longer than `timeout_s`; its output is in the message.
    """
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{shlex.join(command)}: still running after {timeout_s:g} s, stopped") from None
    wall_s = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(
            f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        )
    lines = done.stdout.strip().splitlines()
    try:
        output = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        output = None
    if isinstance(output, dict) and isinstance(output.get("series"), dict):
        return dict(output["series"])
    return {"wall time": {"values": [wall_s]}}


def run_set(name: str) -> int:
    """Run the benchmarks of a set one after another, and return how many of them failed."""
    failed = []
    for module, *arguments in SETS[name]:
        print(f"== {module} {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=ROOT, timeout=SET_TIMEOUT_S, check=False
        )
        if done.returncode:
            failed.append(module)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="SET | LABEL=COMMAND", help=f"one of {', '.join(SETS)}, or commands")
    parser.add_argument("--name", default="commands", help="name of the result (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="recorded runs of each command (%(default)s)")
    parser.add_argument("--warm_ups", type=int, default=1, help="dropped runs of each command (%(default)s)")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/DATE-SHA-NAME.json")
    options = parser.parse_args(argv)
    if options.what[0] in SETS:
        return min(1, run_set(options.what[0]))
    commands = {}
    for text in options.what:
        label, equals, command = text.partition("=")
        if not equals or not shlex.split(command):
            parser.error(f"{text!r} is neither LABEL=COMMAND nor one of {', '.join(SETS)}")
        commands[label] = shlex.split(command)
    try:
        result = run_commands(options.name, commands, runs=options.runs, warm_ups=options.warm_ups)
    except (RuntimeError, OSError) as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    print(result.report())
    print(result.save(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
