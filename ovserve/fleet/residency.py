"""The residency policy: how many workers each model should have now.

    request ──▶ waiting ──its memory fits──▶ loading ──▶ ready ──idle for keep_alive_s──▶ unloading ──▶ unloaded
                   │                                       │
                   └── evicts: idle models first, then those whose turn is over ──┘

Pure: it reads no clock, starts nothing and ends nothing. The supervisor passes what it sees of each model (`ModelView`)
with the time, and writes the answer into the desired records; the reconciler takes the steps.

Rules:
- An eager model is loaded at once, a lazy one with its first request. Both are unloaded after `keep_alive_s` without
  a job, and loaded again by the next request.
- With a memory budget one model loads at a time, and only if everything that is resident, and what the model is
  expected to take, stays under the budget. A model is charged with what it takes now or what it is expected to take,
  whichever is more.
- The memory of each device that reports it is such a budget too, for the weights of the models that use the device.
  Models of different devices do not wait for each other.
- The model that has waited longest loads first; each level of `priority` counts as much as PRIORITY_S of waiting, so no
  priority waits for ever.
- To make room, idle models are unloaded, the least recently used first, then busy ones, those that have been resident
  longest first: their running jobs end and their queued jobs wait for their next turn. A model that has been ready for
  less than `min_resident_s` stays, and so does a pinned one.
- With automatic replicas, a model gets one more worker while jobs wait, if that evicts no other, and one less when
  fewer would do.
- If the measured memory exceeds the budget, idle models are unloaded at once, then the model that is loading: it is
  then expected to take more than it took, and waits for that much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ovserve.settings.options import ModelSettings

__all__ = ["GROW_S", "PRIORITY_S", "SHRINK_S", "Decision", "Limits", "ModelView", "Residency"]

GROW_S = 3.0  # jobs have waited for so long before a model with automatic replicas gets one more worker
SHRINK_S = 60.0  # one worker less would have been enough for so long before it gets one less
PRIORITY_S = 10.0  # seconds of waiting that one level of `priority` is worth
_GROWTH = 1.25  # a model whose load was stopped at the budget is expected to take this multiple of what it took
_MIB = 1 << 20
MACHINE = ""  # in place of the name of a device: the memory of the machine, under `memory_budget_bytes`


@dataclass(frozen=True, slots=True)
class ModelView:
    """What the supervisor sees of one model at one moment.

    Attributes:
        options: the model's options.
        queued, running: its jobs.
        last_used_at: when its newest job was admitted or has ended; 0 if it had none.
        processes: its workers that exist, in every configuration, also those that load or drain.
        ready: workers that take jobs.
        capacity: jobs that these can run at once.
        is_failed: its workers have failed; the supervisor tries again on its own.
        used_bytes: measured memory of all its processes.
        worker_bytes: memory that one worker is expected to take.
        keep_alive_s: how long the newest request lets it stay after its last job; None: as its options say.
        device_bytes: memory that one worker takes on each device in `Limits.devices`, by name.
    """

    options: ModelSettings
    queued: int = 0
    running: int = 0
    last_used_at: float = 0.0
    processes: int = 0
    ready: int = 0
    capacity: int = 0
    is_failed: bool = False
    used_bytes: int = 0
    worker_bytes: int = 0
    keep_alive_s: float | None = None
    device_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.options.name

    @property
    def is_wanted(self) -> bool:
        """Whether it has unfinished jobs."""
        return self.queued + self.running > 0

    @property
    def is_asked_for(self) -> bool:
        """Whether jobs wait for a worker. Those that run on a worker that is being unloaded do not."""
        return self.queued > 0


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits.

    Attributes:
        budget_bytes: memory that the server may take; 0: no limit.
        overhead_bytes: measured memory of the server without its workers.
        min_resident_s: time for which a model is not evicted after it became ready.
        devices: memory of each device that reports it, by name.
    """

    budget_bytes: int = 0
    overhead_bytes: int = 0
    min_resident_s: float = 0.0
    devices: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer of the policy.

    Attributes:
        workers: how many workers each model should have, by name.
        refused: models that can never be loaded now, with the reason.
        waiting: models whose requests wait for memory, with the reason.
        spare_bytes: memory under the budget that no model is charged with; None without a budget.
        spare_devices: the same for each device.
    """

    workers: Mapping[str, int]
    refused: Mapping[str, str] = field(default_factory=dict)
    waiting: Mapping[str, str] = field(default_factory=dict)
    spare_bytes: int | None = None
    spare_devices: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    """What the policy remembers of one model.

    Attributes:
        workers: how many it should have.
        is_due: it should be loaded without a request: it is eager, or an operator has asked for it.
        may_evict: whether that may evict other models.
        ready_since: when its first worker became ready; None while there is none.
        waiting_since: when its oldest wait for a worker began; None while nothing waits.
        keep_alive_s: time after its last job for which it stays, where an operator has set it; else None.
        pressed_since: since when jobs have waited although all its workers are ready; None: none waits.
        slack_since: since when one worker less would have run all its jobs; None: it would not.
        least_bytes: it took so much for one worker when its load was stopped at the budget.
    """

    options: ModelSettings
    workers: int = 0
    is_due: bool = False
    may_evict: bool = False
    ready_since: float | None = None
    waiting_since: float | None = None
    keep_alive_s: float | None = None
    pressed_since: float | None = None
    slack_since: float | None = None
    least_bytes: int = 0


class Residency:
    """Decides which models are resident. Thread-safe: no."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def configure(self, models: Iterable[ModelSettings]) -> None:
        """Take over the models of a configuration.

        A model that is new, or that was lazy and is now eager, is due if it is eager. All others keep their state.
        """
        entries: dict[str, _Entry] = {}
        for options in models:
            entry = self._entries.get(options.name)
            was_eager = entry is not None and not entry.options.is_lazy
            entry = entry or _Entry(options)
            entry.options, entry.least_bytes = options, 0
            if not options.is_lazy and not was_eager:
                entry.is_due, entry.may_evict = True, options.is_pinned
            if entry.workers:
                entry.workers = min(max(entry.workers, options.fewest_workers), options.most_workers)
            entries[options.name] = entry
        self._entries = entries

    def load(self, name: str, keep_alive_s: float | None = None) -> None:
        """Load a model without a request; it may evict others.

        Args:
            name: the model's name.
            keep_alive_s: how long it stays after its last job; infinity: for ever; None: as its options say.
        """
        if entry := self._entries.get(name):
            entry.is_due = entry.may_evict = not entry.workers
            entry.keep_alive_s = keep_alive_s

    def unload(self, name: str) -> None:
        """Unload a model when its running jobs have ended. The next request loads it again."""
        if entry := self._entries.get(name):
            entry.workers, entry.is_due, entry.keep_alive_s = 0, False, None

    def decide(self, now: float, views: Sequence[ModelView], limits: Limits) -> Decision:
        """Return how many workers each model should have now.

        Args:
            now: the time, on the clock of the views.
            views: the models of the configuration.
            limits: the server's limits.
        """
        views = [view for view in views if view.name in self._entries]
        for view in views:
            self._observe(now, view)
            self._unload_if_idle(now, view)
        limited = [view for view in views if limits.budget_bytes or view.device_bytes]
        for view in views:
            if view in limited:
                continue
            entry = self._entries[view.name]
            if not entry.workers and (view.is_asked_for or entry.is_due):
                self._grant(entry)
            else:
                self._scale(now, view, may_grow=True)
        return self._decide_within(now, limited, limits) if limited else Decision(self._workers())

    # --- one model ----------------------------------------------------------------------------------------------------

    def _observe(self, now: float, view: ModelView) -> None:
        entry = self._entries[view.name]
        if view.ready:
            entry.ready_since = now if entry.ready_since is None else entry.ready_since
            entry.waiting_since = None
        else:
            entry.ready_since = None
            if not view.is_asked_for:
                entry.waiting_since = None
            elif entry.waiting_since is None:
                entry.waiting_since = now

    def _unload_if_idle(self, now: float, view: ModelView) -> None:
        """Unload a model that has been idle for its keep-alive time. A load whose clients have gone is finished."""
        entry = self._entries[view.name]
        if not entry.workers or entry.ready_since is None or view.is_wanted or view.is_failed:
            return
        keep_alive_s = entry.options.kept_s if entry.keep_alive_s is None else entry.keep_alive_s
        if view.keep_alive_s is not None and not entry.options.is_pinned:
            keep_alive_s = view.keep_alive_s
        if now - max(view.last_used_at, entry.ready_since) >= keep_alive_s:
            entry.workers, entry.keep_alive_s = 0, None

    def _scale(self, now: float, view: ModelView, *, may_grow: bool) -> None:
        """Give a model with automatic replicas one worker more or less, if that has been due for long enough."""
        entry = self._entries[view.name]
        if entry.workers < 1 or view.ready < entry.workers or view.is_failed:
            entry.pressed_since = entry.slack_since = None  # while a worker loads, nothing is known of it
            return
        each = view.capacity / view.ready
        entry.pressed_since = (entry.pressed_since or now) if view.queued else None
        has_slack = view.queued + view.running <= each * (entry.workers - 1)
        entry.slack_since = (entry.slack_since or now) if has_slack else None
        if entry.workers < entry.options.most_workers and may_grow and _has_lasted(entry.pressed_since, GROW_S, now):
            entry.workers, entry.pressed_since = entry.workers + 1, None
        elif entry.workers > entry.options.fewest_workers and _has_lasted(entry.slack_since, SHRINK_S, now):
            entry.workers, entry.slack_since = entry.workers - 1, None

    def _grant(self, entry: _Entry) -> None:
        entry.workers, entry.is_due = entry.options.fewest_workers, False
        entry.pressed_since = entry.slack_since = None

    def _workers(self) -> dict[str, int]:
        return {name: entry.workers for name, entry in self._entries.items()}

    # --- with a budget ------------------------------------------------------------------------------------------------

    def _worker_bytes(self, view: ModelView) -> int:
        return max(view.worker_bytes, self._entries[view.name].least_bytes)

    def _needed(self, view: ModelView) -> int:
        """Return what a model is expected to take with all its workers."""
        return self._worker_bytes(view) * view.options.fewest_workers

    def _charge(self, view: ModelView) -> int:
        """Return what a model counts with: what it takes now, or is expected to take, whichever is more."""
        return max(view.used_bytes, self._worker_bytes(view) * self._charged_workers(view))

    def _charged_workers(self, view: ModelView) -> int:
        """Return the workers that a model counts with: those that exist if it has failed, else also those to come."""
        return view.processes if view.is_failed else max(self._entries[view.name].workers, view.processes)

    def _spare(self, views: Sequence[ModelView], limits: Limits) -> dict[str, int]:
        """Return what no model is charged with: of the budget, under MACHINE, and of the memory of each device."""
        spare = {device: memory - sum(self._device_charge(view, device) for view in views)
                 for device, memory in limits.devices.items()}  # fmt: skip
        if limits.budget_bytes:
            spare[MACHINE] = limits.budget_bytes - limits.overhead_bytes - sum(map(self._charge, views))
        return spare

    def _device_charge(self, view: ModelView, device: str) -> int:
        return self._charged_workers(view) * view.device_bytes.get(device, 0)

    def _missing(self, view: ModelView, spare: Mapping[str, int], workers: int) -> dict[str, int]:
        """Return how much less is spare than some workers of a model need, where it is less."""
        needs = {MACHINE: workers * self._worker_bytes(view)}
        needs |= {device: workers * size for device, size in view.device_bytes.items()}
        return {place: need - spare[place] for place, need in needs.items() if place in spare and need > spare[place]}

    def _is_loading(self, view: ModelView) -> bool:
        return self._entries[view.name].workers > 0 and not view.ready and not view.is_failed

    def _decide_within(self, now: float, views: Sequence[ModelView], limits: Limits) -> Decision:
        self._shed(views, limits)
        refused: dict[str, str] = {}
        waiting: dict[str, str] = {}
        for view in self._candidates(now, views):
            entry = self._entries[view.name]
            if reason := self._refusal(view, views, limits):
                refused[view.name] = reason
                entry.is_due = False
                continue
            if any(self._shares_place(view, each, limits) for each in views if each.name in waiting):
                waiting[view.name] = "waits for its turn to load"
                continue
            missing = self._missing(view, self._spare(views, limits), view.options.fewest_workers)
            loading = [each.name for each in views if self._is_loading(each) and self._shares_place(view, each, limits)]
            if not loading and not missing:
                self._grant(entry)
                continue
            if not view.is_asked_for and not entry.may_evict and missing:
                entry.is_due = False  # an eager model that is not pinned, and for which there is no room at the start
                continue
            waiting[view.name] = f"waits until {loading[0]} is loaded" if loading else "waits for memory"
            if not loading:
                self._make_room(now, view, views, limits)
        for view in views:
            is_quiet = not waiting and not any(map(self._is_loading, views))
            has_room = is_quiet and not self._missing(view, self._spare(views, limits), 1)
            self._scale(now, view, may_grow=has_room)
        spare = self._spare(views, limits)
        return Decision(self._workers(), refused, waiting, spare.pop(MACHINE, None), spare)

    def _shares_place(self, view: ModelView, other: ModelView, limits: Limits) -> bool:
        """Return whether two models use the same limited memory."""
        return bool(limits.budget_bytes) or not view.device_bytes.keys().isdisjoint(other.device_bytes)

    def _candidates(self, now: float, views: Sequence[ModelView]) -> list[ModelView]:
        """Return the models that should be loaded, first those with requests, the one that has waited longest first."""

        def order(view: ModelView) -> tuple[bool, float]:
            entry = self._entries[view.name]
            waited_s = now - (now if entry.waiting_since is None else entry.waiting_since)
            return not view.is_asked_for, -(waited_s + PRIORITY_S * view.options.priority)

        due = [
            view
            for view in views
            if not self._entries[view.name].workers
            and not view.is_failed
            and (view.is_asked_for or self._entries[view.name].is_due)
        ]
        return sorted(due, key=order)

    def _refusal(self, view: ModelView, views: Sequence[ModelView], limits: Limits) -> str:
        """Return why a model cannot be loaded whatever is evicted, with the arithmetic, or ""."""
        pinned = [each for each in views if each is not view and each.options.is_pinned and self._is_held(each)]
        count = view.options.fewest_workers
        for device, size in view.device_bytes.items():
            held = {each.name: self._device_charge(each, device) for each in pinned if device in each.device_bytes}
            if sum(held.values()) + count * size > limits.devices[device]:
                return (
                    f"its weights{_of_workers(view)} take {_mib(count * size)} on {device}, which has "
                    f"{_mib(limits.devices[device])}{_of_pinned(held)}"
                )
        held = {each.name: self._charge(each) for each in pinned}
        needed = self._needed(view)
        if not limits.budget_bytes or limits.overhead_bytes + sum(held.values()) + needed <= limits.budget_bytes:
            return ""
        return (
            f"it is expected to take {_mib(needed)}{_of_workers(view)}; memory_budget_bytes is "
            f"{_mib(limits.budget_bytes)}, the server itself takes {_mib(limits.overhead_bytes)}{_of_pinned(held)}"
        )

    def _is_held(self, view: ModelView) -> bool:
        return self._entries[view.name].workers > 0 or view.processes > 0

    def _make_room(self, now: float, view: ModelView, views: Sequence[ModelView], limits: Limits) -> None:
        """Unload as few models as make room for one, if that is possible now."""
        spare = self._spare(views, limits)
        for leaving in (each for each in views if not self._entries[each.name].workers):
            self._give_back(leaving, spare)
        count = view.options.fewest_workers
        chosen = []
        for victim in self._victims(now, view, views, limits.min_resident_s):
            missing = self._missing(view, spare, count)
            if not missing:
                break
            if any(place == MACHINE or victim.device_bytes.get(place) for place in missing):
                chosen.append(victim)
                self._give_back(victim, spare)
        if not self._missing(view, spare, count):
            self._evict(chosen)

    def _give_back(self, view: ModelView, spare: dict[str, int]) -> None:
        """Add what a model is charged with to what is spare."""
        for place in spare:
            spare[place] += self._charge(view) if place == MACHINE else self._device_charge(view, place)

    def _victims(
        self, now: float, view: ModelView, views: Sequence[ModelView], min_resident_s: float
    ) -> list[ModelView]:
        """Return the models that may be unloaded for another one: idle ones, then those whose turn is over."""
        idle: list[ModelView] = []
        busy: list[ModelView] = []
        for each in self._evictable(views, without={view.name}):
            ready_since = self._entries[each.name].ready_since
            if ready_since is None:
                continue
            turn_s = min_resident_s
            if each.is_wanted:
                turn_s += PRIORITY_S * max(0, each.options.priority - view.options.priority)
            if now - ready_since >= turn_s:
                (busy if each.is_wanted else idle).append(each)
        return [*self._least_recent(idle), *sorted(busy, key=self._turn_order)]

    def _turn_order(self, view: ModelView) -> tuple[int, float]:
        return view.options.priority, self._entries[view.name].ready_since or 0.0

    def _least_recent(self, views: Iterable[ModelView]) -> list[ModelView]:
        return sorted(views, key=lambda view: max(view.last_used_at, self._entries[view.name].ready_since or 0.0))

    def _evictable(self, views: Sequence[ModelView], without: Collection[str] = ()) -> list[ModelView]:
        return [
            view
            for view in views
            if self._entries[view.name].workers and not view.options.is_pinned and view.name not in without
        ]

    def _evict(self, views: Iterable[ModelView]) -> None:
        for view in views:
            entry = self._entries[view.name]
            entry.workers, entry.keep_alive_s = 0, None

    def _shed(self, views: Sequence[ModelView], limits: Limits) -> None:
        """Unload models while the measured memory exceeds the budget, apart from what is already being unloaded."""
        if not limits.budget_bytes:
            return
        excess = limits.overhead_bytes + sum(view.used_bytes for view in views) - limits.budget_bytes
        excess -= sum(view.used_bytes for view in views if not self._entries[view.name].workers)
        if excess <= 0:
            return
        evictable = self._evictable(views)
        loading = [view for view in views if self._is_loading(view)]
        idle = self._least_recent(view for view in evictable if view.ready and not view.is_wanted)
        busy = sorted((view for view in evictable if view.ready and view.is_wanted), key=self._turn_order)
        held = [view for view in views if self._is_held(view)]
        for view in [*idle, *loading, *busy]:
            if excess <= 0:
                return
            if view in busy and len(held) == 1:
                return  # alone: its own limit of memory ends it
            if view in loading:
                entry = self._entries[view.name]
                workers = max(1, view.processes)
                entry.least_bytes = int(_GROWTH * max(self._worker_bytes(view), view.used_bytes // workers))
            self._evict([view])
            excess -= view.used_bytes


def _has_lasted(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds


def _mib(count: int) -> str:
    return f"{-(-count // _MIB)} MiB"


def _of_pinned(held: Mapping[str, int]) -> str:
    return f", pinned models ({', '.join(held)}) {_mib(sum(held.values()))}" if held else ""


def _of_workers(view: ModelView) -> str:
    count = view.options.fewest_workers
    return f" with {count} workers" if count > 1 else ""
