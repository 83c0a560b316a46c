"""What a figure depends on beside the code: machine, load, versions, commit, model; collected, never typed."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["collect", "commit", "hash_of_model", "load_average"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("openvino", "openvino-genai", "numpy", "pillow", "multipart", "prometheus-client")
GIT_TIMEOUT_S = 10.0
BUSY_CORES = 0.2  # in use by others just before: beyond that they disturb a measurement on any machine
LOOK_S = 0.5  # how long is looked; a load average would still hold the benchmark that ran before
BLOCK_BYTES = 1 << 20


def collect(model: Path | None = None) -> dict[str, Any]:
    """The record that goes into every result file.

    Args:
        model: the served model's directory; its hash is recorded. None: no model was involved.
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
        "command": " ".join(["python", *(_without_place(argument) for argument in sys.argv)]),
        "model": {"name": model.name, "sha256": hash_of_model(model)} if model else None,
    }


def _without_place(argument: str) -> str:
    """An argument without what is true of one machine only: paths are told from the repository, or by their last two names."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ".../" + "/".join(path.parts[-2:])


def cores_in_use() -> float:
    """Cores that are busy while this process does nothing: what else runs (proc(5), /proc/stat)."""
    before = _busy_ticks()
    time.sleep(LOOK_S)
    return round((_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / LOOK_S, 2)


def _busy_ticks() -> int:
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]
    )
    return user + nice + system + irq + softirq + steal


def load_average() -> float:
    """The one-minute load average."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    """The commit that was measured, 10 digits, with `-dirty` when the package or the benchmarks differ from it."""
    revision = _git("rev-parse", "--short=10", "HEAD")
    if not revision:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "ovserve", "benchmarks")
    return f"{revision}-dirty" if changed else revision


def cpu_model() -> str:
    """The processor's name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def governor() -> str:
    """The frequency governor of the first core; `none` where the machine does not show one, as in most virtual machines."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text("utf-8").strip() if path.exists() else "none"


def version_of(package: str) -> str:
    """An installed package's version; empty when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def hash_of_model(directory: Path) -> str:
    """SHA-256, 16 digits, over the names and contents of a model's files, in the order of their names."""
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
