"""Worker processes: exit codes, memory, OOM score, and the tie to the parent process."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovserve.machine import machine_memory_bytes
from ovserve.wire.local.processes import (
    describe_exit,
    raise_oom_score,
    resident_bytes,
    resident_bytes_with_children,
)

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (-9, "killed by signal 9 (SIGKILL): out of memory?"),
        (-11, "killed by signal 11 (SIGSEGV): a crash in native code"),
        (-15, "killed by signal 15 (SIGTERM)"),
        (-70, "killed by signal 70"),
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (None, "still running"),
    ],
)
def test_exit_codes_are_described_for_the_log(exitcode: int | None, words: str) -> None:
    assert describe_exit(exitcode) == words


GROWING = f"""
import os, sys
print("started", flush=True)
sys.stdin.readline()
held = bytearray(os.urandom({32 * MIB}))
print("grown", flush=True)
sys.stdin.readline()
"""


def test_resident_memory_is_what_the_kernel_counts() -> None:
    # A fresh process: one that has freed memory before may fill 32 MiB without growing.
    command = [sys.executable, "-c", GROWING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "started\n"
        before = resident_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "grown\n"
        assert 24 * MIB < resident_bytes(child.pid) - before < 64 * MIB
        child.communicate("\n")


def test_pages_mapped_from_a_file_do_not_count_as_resident(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(32 * MIB))
    before = resident_bytes(os.getpid())
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(set(mapped[:: mmap.PAGESIZE])) > 1  # touches every page
        assert resident_bytes(os.getpid()) - before < 8 * MIB


def test_resident_memory_of_a_process_that_has_ended_is_zero() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert resident_bytes(ended.pid) == 0


WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
UNLIMITED = 9223372036854771712  # how v1 writes no limit


@pytest.mark.parametrize(
    ("membership", "limits", "allowed"),
    [
        ("0::/\n", {}, WHOLE),
        ("0::/\n", {"memory.max": "max"}, WHOLE),
        ("0::/\n", {"memory.max": MIB}, MIB),
        ("0::/system.slice/ovserve.service\n", {"system.slice/ovserve.service/memory.max": MIB}, MIB),
        (
            "0::/system.slice/ovserve.service\n",
            {"system.slice/ovserve.service/memory.max": "max", "system.slice/memory.max": MIB, "memory.max": "max"},
            MIB,
        ),
        ("0::/a/b\n", {"a/b/memory.max": 3 * MIB, "a/memory.max": 2 * MIB}, 2 * MIB),
        ("0::/a/b\n", {"a/b/c/memory.max": MIB, "a/d/memory.max": MIB}, WHOLE),  # limits of other groups
        ("0::/../../host/group\n", {"memory.max": MIB}, MIB),  # seen from another namespace
        ("0::/of:colons\n", {"of:colons/memory.max": MIB}, MIB),
        ("4:memory:/docker/1\n", {"memory/docker/1/memory.limit_in_bytes": MIB}, MIB),
        ("4:cpu,memory:/docker/1\n0::/\n", {"memory/docker/memory.limit_in_bytes": MIB}, MIB),
        (
            "4:memory:/docker/1\n",
            {"memory/memory.limit_in_bytes": MIB},
            MIB,
        ),  # v1 in a container: its own group is the root
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": UNLIMITED}, WHOLE),
        (None, {"memory.max": MIB}, MIB),
    ],
)
def test_memory_limit_is_the_lowest_of_the_control_groups(
    tmp_path: Path, membership: str | None, limits: dict[str, object], allowed: int
) -> None:
    listed, mount = tmp_path / "cgroup", tmp_path / "mount"
    if membership is not None:
        listed.write_text(membership)
    for name, limit in limits.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{limit}\n")
    assert machine_memory_bytes(mount, listed) == allowed


def test_memory_of_this_machine_is_above_zero_and_within_its_size() -> None:
    assert 0 < machine_memory_bytes() <= WHOLE


def test_worker_has_a_higher_oom_score_than_the_front_end() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    own = int(Path("/proc/self/oom_score_adj").read_text())
    raise_oom_score(child.pid)
    assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) == min(1000, own + 500)
    child.communicate()
    raise_oom_score(child.pid)  # has exited: no error


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
sys.stdin.read()
"""
CHILD = """
import os, sys, threading
from ovserve.wire.local.processes import bind_to_parent
bind_to_parent(int(sys.argv[1]))
print("bound", flush=True)
threading.Event().wait()
"""


def test_bound_process_dies_with_its_parent_and_ignores_the_front_ends_signals() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    pid_text, printed = parent.stdout.readline().split()
    assert printed == "bound"
    ended = os.pidfd_open(int(pid_text))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(int(pid_text), number)
    os.kill(int(pid_text), 0)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid_text}/stat").exists() and "Z" not in Path(f"/proc/{pid_text}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(ended)


def test_process_whose_parent_has_ended_exits_before_its_work() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, "1"], stdout=subprocess.PIPE)
    assert child.communicate(timeout=10)[0] == b""
    assert child.returncode == 1


def test_memory_of_children_counts_with_their_parent() -> None:
    before = resident_bytes_with_children(os.getpid())
    program = "held = b'x' * (32 << 20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert resident_bytes_with_children(os.getpid()) - before > 30 << 20
        assert resident_bytes_with_children(child.pid) == resident_bytes(child.pid)
        child.kill()
