"""The memory of this machine, or of the control group that this program is in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["machine_memory_bytes"]


def machine_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the memory this program may use: the machine's, or the lowest limit of its control groups (v2, v1).

    Args:
        cgroups: mount point of the control groups.
        membership: file that lists the control groups of this program.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _limit_files(cgroups, membership):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file
            memory = min(memory, int(limit.read_text("ascii")))
    return memory


def _limit_files(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Yield files that may hold a memory limit of this program's control groups, up to the mount's root (cgroups(7)).

    The root is always included. In a container it is the container's own group, and `membership` may name a path of the
    host.
    """
    groups = {"": "/", "memory": "/"}  # controller to group; v2 names no controller
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text(errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            groups.update((name, path) for name in controllers.split(",") if name in groups)
    for mount, name, path in (
        (cgroups, "memory.max", groups[""]),
        (cgroups / "memory", "memory.limit_in_bytes", groups["memory"]),
    ):
        group = mount / path.lstrip("/")
        yield from (each / name for each in (group, *group.parents) if each.is_relative_to(mount))
