"""The workers of one model in one configuration: slots, limits on silence and memory, backoff, crash loops.

Runs in: the supervisor thread. Nothing here touches a process; the supervisor does that.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ovserve.fleet.desired import DesiredModel
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.launcher import WorkerProcess
from ovserve.wire.link import Link

__all__ = ["DEATH_CAUSES", "Fleet", "Slot", "load_failure"]

# Why a worker died: its model could not be loaded; it was killed for its memory, for its silence, or because it did not
# exit in time; the dispatcher has detached it for what it sent, or did not do; or it ended by itself.
DEATH_CAUSES = ("load", "memory", "hang", "overdue", "broken", "crash")
_LOADING = frozenset({"spawn", "load", "warm-up"})
_JITTER = (0.75, 1.25)  # so that replicas that died together do not restart at the same moment
_TUNABLE = ("threads", "streams", "max_batch")  # options where 0 means that the worker chooses at warm-up
_MAX_TUNED = 256  # the lowest upper bound of these options
_MEASURE_S = 0.2  # between two measurements of a worker's memory while its resident memory changes
_UNCHANGED_S = 2.0  # between them while it does not; mapped files may still get into memory, or out of it
_CHANGE_SHARE = 1 / 64  # a smaller change of resident memory is none
_MEASURE_SHARE = 0.05  # of a core that the measurements of one worker may take
_MEASURE_MAX_S = 20.0  # between two of them at most
_MAX_DOUBLINGS = 32  # beyond any maximum delay; keeps the power finite


@dataclass(slots=True, eq=False)
class Slot:
    """One of a fleet's workers: its running incarnation, or the time of the next start.

    Attributes:
        deaths: in a row without a finished job; the backoff grows with them.
        ready_at: when the supervisor saw the worker ready; 0 before.
        is_retired: the worker gets no more jobs, and is not restarted.
        kill_at: when the worker will be killed.
        kill_reason: why it was killed, or will be.
        kill_cause: the same as one of DEATH_CAUSES.
        write_off_at: when the worker is written off, if it survives SIGKILL until then.
        used_bytes: memory that the worker took when it was last measured.
        peak_bytes: the most that was measured of this incarnation.
        measure_at: when it is measured again, at the earliest.
        measure_by: when it is measured again, if its resident memory has not changed.
        measured_resident_bytes: its resident memory when it was measured.
        exit_reason: why the process has exited, or was written off; set before the dispatcher has read its last
            reports.
    """

    fleet: Fleet
    index: int
    restart_at: float = 0.0
    deaths: int = 0
    process: WorkerProcess | None = None
    link: Link | None = None
    started_at: float = 0.0
    ready_at: float = 0.0
    is_retired: bool = False
    kill_at: float = float("inf")
    kill_reason: str = ""
    kill_cause: str = ""
    is_killed: bool = False
    write_off_at: float = float("inf")
    exit_reason: str = ""
    used_bytes: int = 0
    peak_bytes: int = 0
    measure_at: float = 0.0
    measure_by: float = 0.0
    measured_resident_bytes: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes jobs."""
        return bool(self.ready_at) and not self.exit_reason and not self.is_retired and not self.is_killed

    @property
    def is_worn(self) -> bool:
        """Whether the worker is ready, and a fresh one has to replace it.

        It has finished `max_jobs_per_worker` jobs, or its node is being drained.
        """
        if not self.is_ready or self.link is None or self.process is None:
            return False
        limit = self.fleet.model.max_jobs_per_worker
        return self.process.is_leaving() or (bool(limit) and self.link.state.jobs_done >= limit)

    @property
    def worn_jobs(self) -> int:
        """Jobs that a worn worker has finished, at least 1; 0 if it is not worn."""
        return max(1, self.link.state.jobs_done) if self.is_worn and self.link is not None else 0

    def assign(self, process: WorkerProcess, link: Link, now: float) -> None:
        """Record a new incarnation."""
        self.process, self.link = process, link
        self.started_at, self.ready_at, self.kill_at, self.write_off_at = now, 0.0, float("inf"), float("inf")
        self.is_killed, self.kill_reason, self.kill_cause, self.exit_reason = False, "", "", ""
        self.used_bytes, self.peak_bytes, self.measured_resident_bytes = 0, 0, 0
        self.measure_at = self.measure_by = 0.0

    def clear(self) -> None:
        """Forget the incarnation after its process has exited or was written off."""
        self.process, self.link, self.ready_at, self.used_bytes = None, None, 0.0, 0

    def measure(self, now: float, resident_bytes: int) -> None:
        """Measure the memory that the worker takes, if it is due.

        The kernel counts every page for that, milliseconds for a small worker. It is due often while `resident_bytes`,
        which costs nothing, changes and while the model loads, and rarely otherwise or if measuring takes long.
        """
        if self.process is None or now < self.measure_at:
            return
        change = abs(resident_bytes - self.measured_resident_bytes)
        is_settled = bool(self.ready_at) and change <= resident_bytes * _CHANGE_SHARE
        if is_settled and now < self.measure_by:
            return
        begun_s = time.thread_time()  # CPU time: a thread that had to wait is no reason to wait longer
        self.used_bytes = self.process.memory_bytes()
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.measured_resident_bytes = resident_bytes
        wait_s = min(_MEASURE_MAX_S, (time.thread_time() - begun_s) / _MEASURE_SHARE)
        self.measure_at, self.measure_by = now + max(_MEASURE_S, wait_s), now + max(_UNCHANGED_S, wait_s)

    def silence_limit_s(self, link: Link) -> float:
        """Return the longest silence allowed now: the phase's limit, or more if the newest heartbeat allows more."""
        settings = self.fleet.settings
        if link.state.ready is None or link.state.phase in _LOADING:
            return max(settings.load_timeout_s, link.state.allow_s)
        allow_s = min(link.state.allow_s, settings.load_timeout_s)  # the worker is not trusted
        return max(settings.idle_hang_limit_s if link.state.phase == "idle" else settings.hang_limit_s, allow_s)

    def exceeded_limit(
        self, link: Link, silence_s: float, resident_bytes: int, default_limit_bytes: int
    ) -> tuple[str, str]:
        """Return which limit the worker exceeds: the cause of its death, and the reason in words; both may be empty.

        Args:
            link: the worker's.
            silence_s: time since its newest heartbeat.
            resident_bytes: its memory.
            default_limit_bytes: memory limit if the model sets none.
        """
        limit_s = self.silence_limit_s(link)
        limit_bytes = self.fleet.model.memory_limit_bytes or default_limit_bytes
        if silence_s > limit_s and not link.state.lost:
            return (
                "hang",
                f"hung: no heartbeat for {silence_s:.1f} s in phase {link.state.phase}, {limit_s:g} s allowed",
            )
        if resident_bytes > limit_bytes:
            return "memory", f"memory: {resident_bytes >> 20} MiB resident, {limit_bytes >> 20} MiB allowed"
        return "", ""

    def death_cause(self, link: Link) -> str:
        """Return which of DEATH_CAUSES the death of its worker counts for."""
        if load_failure(link):
            return "load"
        if link.state.is_broken:
            return "broken"
        return self.kill_cause or "crash"

    def backoff_s(self) -> float:
        """Return the delay before the next start: doubled with each death in a row, with jitter.

        `failed_retry_s` if the model has failed.
        """
        settings = self.fleet.settings
        if self.fleet.failure:
            return settings.failed_retry_s
        doubled = settings.restart_delay_s * 2.0 ** min(max(0, self.deaths - 1), _MAX_DOUBLINGS)
        return min(settings.max_restart_delay_s, doubled) * random.uniform(*_JITTER)  # noqa: S311 - no secret


@dataclass(slots=True, eq=False)
class Fleet:
    """The workers of one model in one configuration.

    Args:
        desired: the record that it was started for.

    Attributes:
        desired: the newest record that it serves.
        settings: the server's options in this record.
        model: the model's options in this record, with what the first worker has chosen at warm-up.
        slots: its workers; one for each replica while it serves.
        deaths: in a row over all slots, without a job finished by any of them in between.
        failure: why the model was declared failed, or "".
        was_ready: a worker has passed its warm-up at least once.
        written_off: how many of its processes have survived SIGKILL and still exist.
    """

    desired: DesiredModel
    settings: Settings = field(init=False)
    model: ModelSettings = field(init=False)
    slots: list[Slot] = field(default_factory=list)
    deaths: int = 0
    failure: str = ""
    was_ready: bool = False
    written_off: int = 0
    _tuned: dict[str, Any] = field(default_factory=dict)
    _clients: set[str] = field(default_factory=set)  # each has counted once in `deaths`
    _jobs_done_by_dead: int = 0
    _jobs_done_at_last_death: int = 0

    def __post_init__(self) -> None:
        self.adopt(self.desired)

    def adopt(self, desired: DesiredModel) -> None:
        """Serve a newer record with the same worker key. A failed model is tried again at once."""
        self.desired, self.settings = desired, desired.settings
        self.model = dataclasses.replace(desired.model, **self._tuned)
        if self.failure:
            for slot in self.slots:
                slot.restart_at = 0.0

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model.name

    @property
    def ready_slots(self) -> list[Slot]:
        """Slots whose workers take jobs."""
        return [slot for slot in self.slots if slot.is_ready]

    @property
    def active_slots(self) -> list[Slot]:
        """Slots that are not retired."""
        return [slot for slot in self.slots if not slot.is_retired]

    @property
    def is_loading(self) -> bool:
        """Whether one of its processes has not been ready yet."""
        return any(slot.process is not None and not slot.ready_at for slot in self.slots)

    @property
    def crash_loop_reason(self) -> str:
        """Reason that one slot is in a crash loop, whatever the state of the others; "" if none is."""
        worst = max(self.active_slots, key=lambda slot: slot.deaths, default=None)
        if worst is None or worst.deaths < self.settings.crash_loop_limit:
            return ""
        return f"worker {worst.index} died {worst.deaths} times in a row without finishing a job"

    @property
    def is_start_blocked(self) -> bool:
        """Whether no more processes are started, because more than `replicas` of them have survived SIGKILL."""
        return self.written_off > self.model.most_workers

    def fill_slots(self, count: int) -> None:
        """Create slots until `count` are active, each due for a start."""
        active = {slot.index for slot in self.active_slots}
        missing = [index for index in range(count) if index not in active]
        self.slots += [Slot(self, index) for index in missing[: max(0, count - len(active))]]

    def needs_successor(self, count: int) -> bool:
        """Return whether one worker beyond `count` should run, to take over from a worn one.

        One at a time, so that a fleet has the memory of at most one more worker: not while a retired worker still
        finishes its jobs. When the successor is ready, there is one too many, and the worn one is the surplus.
        """
        if not count or self.failure or not any(slot.is_worn for slot in self.slots):
            return False
        return len(self.ready_slots) <= count and len(self.active_slots) == len(self.slots)

    def surplus_slots(self, count: int) -> list[Slot]:
        """Return the active slots beyond `count`.

        First those that are not ready, then worn ones, the one with the most jobs done first, so that each is replaced
        in turn; then the highest indices.
        """
        active = sorted(self.active_slots, key=lambda slot: (slot.is_ready, -slot.worn_jobs, -slot.index))
        return active[: max(0, len(active) - count)]

    def may_start(self, slot: Slot) -> bool:
        """Return whether a worker may be started in this slot.

        While the model has never been ready, or has failed, only one slot tries it. The others follow when that one is
        ready, and use its compiled model from the cache and the thread and stream counts that it has chosen.
        """
        if self.is_start_blocked:
            return False
        return (self.was_ready and not self.failure) or slot is next(iter(self.active_slots), None)

    def note_ready(self, slot: Slot, link: Link, now: float) -> None:
        """Record that a worker has passed its warm-up. What the first one has chosen applies to all later ones."""
        if self.failure:  # the other slots wait for the next attempt at a model that has failed
            for other in self.slots:
                other.restart_at = min(other.restart_at, now)
        slot.ready_at, self.was_ready, self.failure = now, True, ""
        if link.state.ready is not None:
            self._tuned |= _chosen(self.model, link.state.ready.tuned)
            self.model = dataclasses.replace(self.model, **self._tuned)

    def note_death(self, slot: Slot, link: Link, reason: str, now: float) -> None:
        """Count a death, and set `failure` if the model has to be declared failed.

        A crash loop is a worker that repeatedly dies without doing work. So the count restarts at a worker that has
        finished a job, and at one that died after a long life without losing a job. The second death with the same job
        does not count, and no second death with the jobs of one client: they say more about the job or the client than
        about the worker, and one client could otherwise take the model from all others. A worker that was lost with its
        cluster, or was never placed there, does not count either.
        """
        done = self._jobs_done_by_dead + sum(each.link.state.jobs_done for each in self.slots if each.link)
        has_worked = link.state.jobs_done > 0
        is_old = (
            bool(slot.ready_at) and now - slot.ready_at > self.settings.max_restart_delay_s and not link.state.jobs_lost
        )
        if done != self._jobs_done_at_last_death or has_worked or is_old:
            self.deaths = 0
            self._clients.clear()
        if has_worked or is_old:
            slot.deaths = 0
        elif slot.process is not None and slot.process.was_lost():
            pass
        elif not link.state.lost_retried_job and link.state.lost_client not in self._clients:
            slot.deaths += 1
            self.deaths += 1
            self._clients |= {link.state.lost_client} - {""}
        self._jobs_done_by_dead += link.state.jobs_done
        self._jobs_done_at_last_death = done
        slot.clear()
        if self.ready_slots:
            return  # another worker serves the model
        if self.is_start_blocked and not any(other.process for other in self.slots):
            self.failure = (
                f"{self.written_off} processes of this model have survived SIGKILL; a new one is started when one of "
                f"them has exited; the last: {reason}"
            )
            return
        if link.state.failure is not None and not self.was_ready:
            self.failure = reason  # reported by the worker, which cannot load: an immediate retry would fail again
        elif self.deaths >= self.settings.crash_loop_limit:
            self.failure = f"{self.deaths} workers in a row died without finishing a job; the last: {reason}"


def _chosen(model: ModelSettings, tuned: Mapping[str, object]) -> dict[str, Any]:
    """Return a worker's choices for options that the operator has left open."""
    chosen: dict[str, Any] = {}
    for name in _TUNABLE:
        value = tuned.get(name)
        if type(value) is int and 1 <= value <= _MAX_TUNED and not getattr(model, name):
            chosen[name] = value
    return chosen


def load_failure(link: Link) -> str:
    """Return the reason that the worker itself has reported for its exit, or ""."""
    return str(link.state.failure.error.get("message", "")) if link.state.failure else ""
