"""Runs the trials of `ovserve tune`: candidates in turns, each run in a process of its own with a deadline.

A crash, or the kernel's killer at the end of the memory, loses one run. Candidates run in turns, round after round, so
that a machine which becomes slower does so for all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

from ovserve.deadline import Deadline
from ovserve.models.plans import Plan
from ovserve.settings.options import ModelSettings
from ovserve.wire.local.processes import run_worker
from ovserve.worker.trials import Measured, Trial, receive
from ovserve.worker.trials import main as run_trial

__all__ = ["Candidate", "run_one", "run_rounds"]

_KILLED_S = 10.0  # until a killed process has ended; one that waits for a device does not
_HINTS = {signal.SIGKILL: ", out of memory?", signal.SIGSEGV: ", a crash in native code"}


@dataclass(slots=True)
class Candidate:
    """A plan for one directory, and what its runs have measured.

    Attributes:
        settings: the options of the model in that directory.
        plan: the plan.
        setting: options in `settings` that make this candidate, which no plan can have; empty: there are none.
        runs: what the runs that succeeded have measured, one for each round.
        failure: why the last run failed; empty: it did not.
    """

    settings: ModelSettings
    plan: Plan
    setting: str = ""
    runs: list[Measured] = field(default_factory=list)
    failure: str = ""

    @property
    def title(self) -> str:
        """What differs from the library's own plan."""
        return self.setting or str(self.plan)

    def median(self, name: str) -> float:
        """Return the median of an attribute of `Measured` over the runs."""
        return float(statistics.median(getattr(run, name) for run in self.runs))

    @property
    def psnr(self) -> float:
        """The lowest of all runs."""
        return min(run.psnr for run in self.runs)

    def seconds(self, steps: int) -> float:
        """Return the seconds of an edit that runs so many denoising steps: the median of all runs."""
        return statistics.median(_seconds(run, steps) for run in self.runs)

    def is_faster(self, other: Candidate, steps: int, gain: float) -> bool:
        """Return whether an edit of so many steps was faster by this factor in every round: noise must not decide."""
        pairs = list(zip(self.runs, other.runs, strict=False))
        return bool(pairs) and all(_seconds(mine, steps) * gain < _seconds(its, steps) for mine, its in pairs)


def _seconds(run: Measured, steps: int) -> float:
    """Return the seconds of an edit that runs so many denoising steps, estimated from those that were run."""
    return run.edit_s + (steps - run.steps) * run.step_s


def run_rounds(
    candidates: Sequence[Candidate],
    trial: Trial,
    *,
    rounds: int,
    timeout_s: float,
    total: Deadline,
    report: Callable[[str], None],
    run: Callable[[Trial, float], Measured | str] | None = None,
) -> None:
    """Run all candidates in turns; the first one makes the reference picture. One that fails is not run again.

    Args:
        candidates: what to measure; their `runs` and `failure` are set.
        trial: what all of them do.
        rounds: how many times each one is run.
        timeout_s: time limit of a run.
        total: no run takes longer.
        report: called with a line about each run.
        run: makes one run within a time; None: in a process, `run_one`.
    """
    reference = b""
    for number in range(1, rounds + 1):
        for candidate in candidates:
            if candidate.failure:
                continue
            name = f"round {number} of {rounds}, {candidate.settings.name}, {candidate.title}"
            limit_s = min(timeout_s, total.remaining())
            if limit_s <= 0:
                report("the total time limit was reached")
                for each in candidates:
                    each.failure = each.failure or ("" if each.runs else "not measured before the total time limit")
                return
            this = replace(trial, settings=candidate.settings, plan=candidate.plan, reference=reference)
            found = (run or run_one)(this, limit_s)
            if isinstance(found, str):
                if not (candidate.runs and total.is_expired()):  # else it is not to blame
                    candidate.failure = found
                report(f"{name}: {found}")
            else:
                candidate.runs.append(found)
                reference = reference or found.pixels
                report(f"{name}: {found.step_s:.3g} s a step")
            if not reference:
                return  # there is nothing to compare with


def run_one(trial: Trial, timeout_s: float, target: Callable[..., None] = run_trial) -> Measured | str:
    """Run a trial in a process, which ends with this thread; return what it measured, or why it failed."""
    context, deadline = get_context("spawn"), Deadline.after(timeout_s)
    late = f"ended after {timeout_s:.0f} s, the time limit"
    link, end = context.Pipe(duplex=False)
    process = context.Process(target=run_worker, args=(target, os.getpid(), None, end, trial), daemon=True)
    results: SimpleQueue[Measured | str | Exception] = SimpleQueue()
    # A read has no time limit, and a process can stop in the middle of what it sends.
    reader = threading.Thread(target=_read, args=(link, results), name="trial", daemon=True)
    try:
        process.start()
        end.close()
        reader.start()
        found = results.get(timeout=deadline.remaining())
        if not isinstance(found, Exception):
            return found
        process.join(deadline.remaining())
        if process.exitcode == 0 and not isinstance(found, EOFError):
            return f"its result cannot be read: {found}"
        return late if process.exitcode is None else _describe_exit(process.exitcode)
    except Empty:
        return late
    except OSError as error:  # it ended before it had read its trial, or there can be no further process
        return f"its process could not be started: {error}"
    finally:
        end.close()
        if process.pid is not None:
            process.kill()
            process.join(_KILLED_S)
            with contextlib.suppress(ValueError):  # it still runs
                process.close()
        if reader.ident is not None:
            reader.join(_KILLED_S)
        link.close()


def _read(link: Connection, results: SimpleQueue[Measured | str | Exception]) -> None:
    """Put what a trial sends, or why that cannot be read, into the queue. Runs in: a thread of its own."""
    try:
        results.put(receive(link))
    except (EOFError, OSError, ValueError) as error:
        results.put(error)


def _describe_exit(exitcode: int) -> str:
    if exitcode >= 0:
        return f"its process exited with code {exitcode}"
    with contextlib.suppress(ValueError):
        number = signal.Signals(-exitcode)
        return f"its process was killed by {number.name}{_HINTS.get(number, '')}"
    return f"its process was killed by signal {-exitcode}"
