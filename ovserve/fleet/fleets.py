"""The workers of one model in one configuration: their slots, and the rules for silence, death, back-off and crash loops.

Runs in: the supervisor thread. No processes are touched here; that is the supervisor's own work.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from typing import Any

from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.pipes import Link

__all__ = ["Fleet", "Slot", "load_failure", "make_fleets"]

_LOADING = frozenset({"spawn", "load", "warm-up"})
_JITTER = (0.75, 1.25)  # replicas that died together do not start in step
_TUNABLE = ("threads", "streams", "max_batch")  # options whose 0 means: chosen at warm-up
_MOST_TUNED = 256  # the least upper bound of these options
_DOUBLINGS = 32  # beyond any largest delay; keeps the power finite


@dataclass(slots=True, eq=False)
class Slot:
    """One of a fleet's workers: the process that fills it now, or when the next one is due.

    Attributes:
        deaths: in a row, without a finished job; the back-off grows with it.
        ready_at: when the supervisor saw it ready; 0 before.
        is_retired: it gets no more jobs, and no successor.
        end_by: the instant at which it is killed.
        kill_reason: why it was, or will be.
        abandon_at: the instant at which it is done without, though the kill has not ended it.
        exit_reason: the process has ended, or is done without; the dispatcher has still to read its last words.
    """

    fleet: Fleet
    index: int
    restart_at: float = 0.0
    deaths: int = 0
    process: SpawnProcess | None = None
    link: Link | None = None
    pid: int = 0
    started_at: float = 0.0
    ready_at: float = 0.0
    is_retired: bool = False
    end_by: float = float("inf")
    kill_reason: str = ""
    is_killed: bool = False
    abandon_at: float = float("inf")
    exit_reason: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return bool(self.ready_at) and not self.exit_reason and not self.is_retired and not self.is_killed

    def fill(self, process: SpawnProcess, link: Link, now: float) -> None:
        """A new incarnation has started."""
        self.process, self.link, self.pid = process, link, process.pid or 0
        self.started_at, self.ready_at, self.end_by, self.abandon_at = now, 0.0, float("inf"), float("inf")
        self.is_killed, self.kill_reason, self.exit_reason = False, "", ""

    def empty(self) -> None:
        """The incarnation is gone."""
        self.process, self.link, self.ready_at = None, None, 0.0

    def silence_limit_s(self, link: Link) -> float:
        """Longest silence allowed now: the phase's limit, or more where the worker's newest beat asked for it."""
        settings = self.fleet.settings
        if link.ready is None or link.phase in _LOADING:
            return max(settings.load_timeout_s, link.allow_s)
        if link.phase == "idle":
            return max(settings.idle_hang_limit_s, link.allow_s)
        return max(settings.hang_limit_s, link.allow_s)

    def fault(self, link: Link, silence_s: float, resident_bytes: int, most_bytes: int) -> str:
        """Why it has to be killed; empty where nothing is wrong. `most_bytes`: of memory, where the model has no limit of its own."""
        limit_s = self.silence_limit_s(link)
        allowed_bytes = self.fleet.model.memory_limit_bytes or most_bytes
        if silence_s > limit_s and not link.lost:
            return f"hung: no heartbeat for {silence_s:.1f} s in phase {link.phase}, {limit_s:g} s allowed"
        if resident_bytes > allowed_bytes:
            return f"memory: {resident_bytes >> 20} MiB resident, {allowed_bytes >> 20} MiB allowed"
        return ""

    def delay_s(self) -> float:
        """Back-off before the next start: doubles with each death in a row, with jitter; longer once the model has failed."""
        settings = self.fleet.settings
        if self.fleet.failure:
            return settings.failed_retry_s
        doubled = settings.restart_delay_s * 2.0 ** min(max(0, self.deaths - 1), _DOUBLINGS)
        return min(settings.max_restart_delay_s, doubled) * random.uniform(*_JITTER)  # noqa: S311 - no secret


@dataclass(slots=True, eq=False)
class Fleet:
    """The workers of one model in one configuration.

    Attributes:
        deaths: in a row over all slots, without a job finished by any of them in between.
        failure: why the model was declared failed; empty when it was not.
        was_ready: a worker of it has passed its warm-up once.
        unkillable: its processes that SIGKILL has not ended, and that are still there.
    """

    settings: Settings
    model: ModelSettings
    profile: ModelProfile
    slots: list[Slot] = field(default_factory=list)
    deaths: int = 0
    failure: str = ""
    was_ready: bool = False
    unkillable: int = 0
    _jobs_done_by_the_gone: int = 0
    _jobs_done_at_death: int = 0

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @property
    def ready_slots(self) -> list[Slot]:
        """Those that take jobs."""
        return [slot for slot in self.slots if slot.is_ready]

    @property
    def staying_slots(self) -> list[Slot]:
        """Those that have not been told to end."""
        return [slot for slot in self.slots if not slot.is_retired]

    @property
    def is_loading(self) -> bool:
        """Whether one of its processes has not worked yet."""
        return any(slot.process is not None and not slot.ready_at for slot in self.slots)

    @property
    def crash_loop_reason(self) -> str:
        """Why one of its slots will not be filled, whatever the others do; empty while each may be."""
        worst = max(self.staying_slots, key=lambda slot: slot.deaths, default=None)
        if worst is None or worst.deaths < self.settings.crash_loop_limit:
            return ""
        return f"worker {worst.index} died {worst.deaths} times in a row without finishing a job"

    @property
    def is_wedged(self) -> bool:
        """Whether its processes do not end, nor do those that came for them: what holds them would hold any further one."""
        return self.unkillable > self.model.replicas

    def restore(self) -> None:
        """Make slots anew for those that have been told to end: their successors did not come."""
        taken = {slot.index for slot in self.staying_slots}
        self.slots += [Slot(self, index) for index in range(self.model.replicas) if index not in taken]

    def may_start(self, slot: Slot) -> bool:
        """One slot tries a model that has not worked yet, or has failed; the others follow when it has worked.

        They find its compiled model in the cache, and its division of the device in the settings.
        """
        if self.is_wedged:
            return False
        return (self.was_ready and not self.failure) or slot is next(iter(self.staying_slots), None)

    def note_ready(self, slot: Slot, link: Link, now: float) -> None:
        """A worker has passed its warm-up. What the first one measured and chose holds for all that follow."""
        slot.ready_at, self.was_ready, self.failure = now, True, ""
        if link.ready is not None:
            self.model = _tuned(self.model, link.ready.tuned)

    def note_death(self, slot: Slot, link: Link, reason: str, now: float) -> None:
        """Count a death, and declare the model failed where that is due (`failure` is set).

        A worker that has finished a job, or that died without one after a long life, starts the count anew: a crash loop is a
        worker that does no work, again and again. The second death under one job says more about the job than about the worker
        and is not counted, else three bad requests could take a model away from everybody.
        """
        done = self._jobs_done_by_the_gone + sum(p.link.jobs_done for p in self.slots if p.link)
        has_worked = link.jobs_done > 0
        is_old = bool(slot.ready_at) and now - slot.ready_at > self.settings.max_restart_delay_s and not link.jobs_lost
        if has_worked or is_old:
            slot.deaths = self.deaths = 0
        elif not link.lost_second_try:
            slot.deaths += 1
            self.deaths = self.deaths + 1 if done == self._jobs_done_at_death else 1
        self._jobs_done_by_the_gone += link.jobs_done
        self._jobs_done_at_death = done
        slot.empty()
        if self.ready_slots:
            return  # the model works
        if self.is_wedged and not any(other.process for other in self.slots):
            self.failure = f"{self.unkillable} of its processes do not end, and no more are started until one does; the last: {reason}"
            return
        if link.failure is not None and not self.was_ready:
            self.failure = reason  # it said itself that it cannot load: trying at once again would change nothing
        elif self.deaths >= self.settings.crash_loop_limit:
            self.failure = f"{self.deaths} workers in a row died without finishing a job; the last: {reason}"


def make_fleets(settings: Settings, profiles: Mapping[str, ModelProfile]) -> dict[str, Fleet]:
    """A fleet for each model, every slot due at once."""
    fleets = {model.name: Fleet(settings, model, profiles[model.name]) for model in settings.models}
    for fleet in fleets.values():
        fleet.slots = [Slot(fleet, index) for index in range(fleet.model.replicas)]
    return fleets


def _tuned(model: ModelSettings, tuned: Mapping[str, object]) -> ModelSettings:
    """The settings with what a worker chose, where the operator left it open."""
    chosen: dict[str, Any] = {}
    for name in _TUNABLE:
        value = tuned.get(name)
        if type(value) is int and 1 <= value <= _MOST_TUNED and not getattr(model, name):
            chosen[name] = value
    return dataclasses.replace(model, **chosen)


def load_failure(link: Link) -> str:
    """What the worker itself said of why it gives up; empty when it said nothing."""
    return str(link.failure.error.get("message", "")) if link.failure else ""
