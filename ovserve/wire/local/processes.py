"""Worker process set-up, and what the kernel reports of processes: exit codes, memory, OOM score.

Linux only (/proc, prctl). Runs in: worker (`bind_to_parent` and `run_worker`), supervisor (everything else).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ovserve.wire.local.output import redirect_native_output

__all__ = [
    "BLOCKED_SIGNALS",
    "bind_to_parent",
    "children_of",
    "describe_exit",
    "die_with",
    "proportional_bytes",
    "proportional_bytes_with_children",
    "raise_oom_score",
    "resident_bytes",
    "resident_bytes_with_children",
    "run_worker",
]  # fmt: skip

# For the front end; workers ignore them.
BLOCKED_SIGNALS = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
)

_PR_SET_PDEATHSIG = 1  # prctl(2)
_OOM_STEP = 500  # of 1000: any worker is killed before a front end of ordinary size (proc(5), oom_score_adj)
_HINTS = {
    signal.SIGKILL: ": out of memory?",
    signal.SIGSEGV: ": a crash in native code",
    signal.SIGBUS: ": a crash in native code, or a full disk under a mapped file",
    signal.SIGABRT: ": native code aborted",
    signal.SIGILL: ": an instruction that this CPU does not have",
    signal.SIGFPE: ": an arithmetic fault in native code",
}


def bind_to_parent(parent: int) -> None:
    """Have the kernel kill this process when the front end `parent` (a pid) ends, and ignore the front end's signals.

    The kernel kills it when the *thread* that spawned it ends (prctl(2), PR_SET_PDEATHSIG), so the supervisor's thread
    has to outlive its workers. If the parent ended before the call, the parent pid has changed: this process then exits
    with code 1. Runs in: worker.
    """
    for number in BLOCKED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that spawned it ends; exit now if `parent` has ended.

    Runs in: worker, bridge.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def run_worker(main: Callable[..., None], parent: int, output: Connection | None, *arguments: Any) -> None:
    """Run `main` in a process that ends with its front end. The spawn target. Runs in: worker.

    Args:
        main: called with `arguments`.
        parent: the front end's process id.
        output: a pipe for what native libraries write to standard error; None: it stays where it goes.
        arguments: for `main`.

    Defined in this file because a worker imports the module of its spawn target, and must not import the supervisor.
    """
    bind_to_parent(parent)
    if output is not None:
        redirect_native_output(output)
    main(*arguments)


def describe_exit(exitcode: int | None) -> str:
    """Return an exit code of multiprocessing (negative: a signal) as text for the log."""
    if exitcode is None:
        return "still running"
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"killed by signal {-exitcode}"
    return f"killed by signal {-exitcode} ({number.name}){_HINTS.get(number, '')}"


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process without pages mapped from files; 0 if the process does not exist.

    The kernel reclaims file pages when it needs memory, so mapped weights do not count as a leak.
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as stream:
            _, resident, shared, *_ = stream.read().split()  # proc(5): pages
            return max(0, int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def resident_bytes_with_children(pid: int) -> int:
    """Return `resident_bytes` of a process and its direct children: a worker and its decoding process."""
    return resident_bytes(pid) + sum(map(resident_bytes, children_of(pid)))


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process; none if it has exited, or if the kernel does not list them."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as stream:
                found += map(int, stream.read().split())
    return found


def proportional_bytes(pid: int) -> int:
    """Return the memory that a process takes: its own pages, and its share of pages that others map too (PSS).

    Weights that are mapped from files count. Return 0 if the process does not exist.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as stream:
            for line in stream:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024  # proc(5): kB
    except ProcessLookupError:  # it has exited
        return 0
    except (OSError, ValueError):  # an old kernel, or access is restricted
        pass
    try:
        with open(f"/proc/{pid}/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def proportional_bytes_with_children(pid: int) -> int:
    """Return `proportional_bytes` of a process and its direct children."""
    return proportional_bytes(pid) + sum(map(proportional_bytes, children_of(pid)))


def raise_oom_score(pid: int) -> None:
    """Make the kernel's OOM killer choose this process before the caller. Best effort; needs no privilege."""
    with contextlib.suppress(OSError, ValueError):
        own = int(Path("/proc/self/oom_score_adj").read_text("ascii"))
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(1000, own + _OOM_STEP)), "ascii")
