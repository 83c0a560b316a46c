"""What a worker process is told about its life at birth, and what the kernel tells of it: exit codes, memory, OOM rank.

Linux only (/proc, prctl). `enter` and `run_worker` run in the worker, everything else in the supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "MASKED", "enter", "explain_exit", "machine_memory_bytes", "prefer_for_oom", "resident_bytes", "run_worker",
]  # fmt: skip

MASKED = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})  # the front end's to hear; workers never do

_PR_SET_PDEATHSIG = 1  # prctl(2)
_OOM_STEP = 500  # of 1000: any worker goes before any front end of ordinary size (proc(5), oom_score_adj)
_HINTS = {
    signal.SIGKILL: ": out of memory?",
    signal.SIGSEGV: ": a crash in native code",
    signal.SIGBUS: ": a crash in native code, or a full disk under a mapped file",
    signal.SIGABRT: ": native code gave up",
    signal.SIGILL: ": an instruction this CPU does not have",
    signal.SIGFPE: ": an arithmetic fault in native code",
}


def enter(parent: int) -> None:
    """Tie this process to its front end `parent` (a pid), and leave the front end's signals to it. Runs in: worker.

    The kernel kills the process when the *thread* that spawned it ends (prctl(2), PR_SET_PDEATHSIG): the supervisor's thread
    outlives its workers. A parent that was gone before the call is told by the changed parent pid.
    """
    for number in MASKED:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def run_worker(main: Callable[..., None], parent: int, *arguments: Any) -> None:
    """The first code of ours in a worker process: `main`, tied to its front end. Runs in: worker.

    Here, and not where it is spawned: the process imports this file, and nothing of a supervisor.
    """
    enter(parent)
    main(*arguments)


def explain_exit(exitcode: int | None) -> str:
    """An exit code of multiprocessing (negative: a signal) in an operator's words."""
    if exitcode is None:
        return "still running"
    if exitcode >= 0:
        return f"ended by itself with exit code {exitcode}"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"killed by signal {-exitcode}"
    return f"killed by signal {-exitcode} ({number.name}){_HINTS.get(number, '')}"


def resident_bytes(pid: int) -> int:
    """Resident memory of a process without the pages it maps from files, which the kernel takes back when it needs them (weights
    that are mapped are no leak); 0 when it is gone.
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as stream:
            _, resident, shared, *_ = stream.read().split()  # proc(5): pages
            return max(0, int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def machine_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Memory this program may use: the machine's, or the least limit of its control group and all above it (v2, v1).

    Args:
        cgroups: where the control groups are mounted.
        membership: tells which of them this program is in.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _limit_files(cgroups, membership):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file
            memory = min(memory, int(limit.read_text("ascii")))
    return memory


def _limit_files(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Files that may hold a memory limit of this program's control groups, up to the root of the mount (cgroups(7)).

    The root is always among them. In a container it is the container's own group, and membership may name a path of the host's.
    """
    groups = {"": "/", "memory": "/"}  # controllers (v2: none is named) and the group
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


def prefer_for_oom(pid: int) -> None:
    """Make the kernel's OOM killer take this process before the caller. Raising the rank needs no privilege."""
    with contextlib.suppress(OSError, ValueError):
        own = int(Path("/proc/self/oom_score_adj").read_text("ascii"))
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(1000, own + _OOM_STEP)), "ascii")
