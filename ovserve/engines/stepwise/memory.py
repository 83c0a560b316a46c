"""The memory that this process may still allocate."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory this process may still allocate: free on the host, or left of the container's limit if less.

    Args:
        proc: where procfs is mounted.
        cgroups: where the unified hierarchy (cgroup v2) is mounted.
    """
    free = _field(proc / "meminfo", "MemAvailable:")
    resident = _field(proc / "self" / "status", "VmRSS:")
    return max(0, min([free, *(limit - resident for limit in _limits(proc / "self" / "cgroup", cgroups))]))


def _field(path: Path, name: str) -> int:
    """Return a field of a procfs file in bytes (the file has KiB); 0 if it is missing."""
    for line in path.read_text("ascii", "replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _limits(own: Path, cgroups: Path) -> list[int]:
    """Return the visible memory limits of the control group in the file `own` and of its parents."""
    found = []
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    path = cgroups / group.lstrip("/")
    for directory in (path, *path.parents):
        if not directory.is_relative_to(cgroups):
            break
        try:
            found.append(int((directory / "memory.max").read_text()))
        except (OSError, ValueError):
            continue  # the root has no such file; "max" means no limit
    return found
