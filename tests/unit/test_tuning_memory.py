"""The memory that a worker may still allocate."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovserve.engines.stepwise.memory import available_bytes

KIB, GIB = 1 << 10, 1 << 30


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, 8 * GIB),
        ({"a/b": "max", "a": "max"}, 8 * GIB),
        ({"a/b": str(3 * GIB)}, 2 * GIB),
        ({"a/b": "max", "a": str(2 * GIB)}, GIB),
        ({"a/b": str(64 * GIB)}, 8 * GIB),
        ({"a/b": str(GIB // 2)}, 0),
    ],
)
def test_available_memory_is_the_smaller_of_the_hosts_and_the_containers(
    tmp_path: Path, limits: dict[str, str], left: int
) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroups / "a" / "b").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {16 * GIB // KIB} kB\nMemAvailable: {8 * GIB // KIB} kB\n")
    (proc / "self" / "status").write_text(f"Name: worker\nVmRSS: {GIB // KIB} kB\n")
    (proc / "self" / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    for group, text in limits.items():
        (cgroups / group / "memory.max").write_text(text + "\n")
    assert available_bytes(proc, cgroups) == left
