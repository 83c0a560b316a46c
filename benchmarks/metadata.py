"""Collect the metadata of a result: machine, load, versions, commit and model."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["collect", "commit", "hash_of_model", "load_average", "portable_argument"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("openvino", "openvino-genai", "numpy", "pillow", "multipart", "prometheus-client", "zlib-ng")
GIT_TIMEOUT_S = 10.0
BUSY_CORES = 0.2  # cores in use by other processes before a run: more than this disturbs a measurement on any machine
SAMPLE_S = 0.5  # over this time; a load average would still contain the previous benchmark
BLOCK_BYTES = 1 << 20
_ABSOLUTE = re.compile(r"(?<![\w./:-])(?:/[\w.@+~-]+)+")  # no part of a relative path or URL


def collect(model: Path | None = None) -> dict[str, Any]:
    """Return the metadata of a result file.

    Args:
        model: directory of the served model; its hash is recorded. None: no model is recorded.
    """
    load, in_use = load_average(), cores_in_use()
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": governor(),
        "kernel": platform.release(),
        "load_1min": load,
        "cores_in_use": in_use,
        "busy": in_use > BUSY_CORES,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "command": " ".join(["python", *(portable_argument(argument) for argument in sys.argv)]),
        "model": {"name": model.name, "sha256": hash_of_model(model)} if model else None,
    }


def portable_argument(argument: str) -> str:
    """Return an argument without machine-specific parts.

    Each absolute path in it, also one inside `NAME=PATH` or a command in quotes, is given relative to the repository,
    or by its last two names.
    """
    return _ABSOLUTE.sub(_portable_path, argument)


def _portable_path(found: re.Match[str]) -> str:
    path = Path(found.group())
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ".../" + "/".join(path.parts[-2:])


def cores_in_use() -> float:
    """Return the number of cores that other processes use, measured while this process sleeps (proc(5), /proc/stat)."""
    before = _busy_ticks()
    time.sleep(SAMPLE_S)
    return round((_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / SAMPLE_S, 2)


def _busy_ticks() -> int:
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]
    )
    return user + nice + system + irq + softirq + steal


def load_average() -> float:
    """Return the one-minute load average."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    """Return the measured commit, 10 digits; with `-dirty` if the package or the benchmarks differ from it."""
    revision = _git("rev-parse", "--short=10", "HEAD")
    if not revision:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "ovserve", "benchmarks")
    return f"{revision}-dirty" if changed else revision


def cpu_model() -> str:
    """Return the name of the processor, as in /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def governor() -> str:
    """Return the frequency governor of the first core; `none` where there is none, as in most virtual machines."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text("utf-8").strip() if path.exists() else "none"


def version_of(package: str) -> str:
    """Return the version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def hash_of_model(directory: Path) -> str:
    """Return a SHA-256, 16 digits, over the names and contents of a model's files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in directory.rglob("*") if path.is_file() and path.suffix in (".xml", ".bin", ".json")
    ):
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
