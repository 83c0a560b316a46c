"""Supervisor: spawns and watches the worker processes, kills hung ones, restarts dead ones with backoff.

    fleet = the workers of one model in one configuration
    slot  = one of a fleet's `replicas`, with one incarnation at a time

    waiting ──restart_at──▶ starting ──Ready──▶ ready ──retire──▶ stopping
       ▲                        │                  │                  │
       └────────── died ◀───────┴──────────────────┘             exited, or killed at kill_at

    A process that survives SIGKILL, because a driver blocks it in an uninterruptible call, counts as died. Only
    `_written_off` still refers to it.

Invariants:
- One thread does all the work; other threads queue a call and wake it. It waits for all processes and the wake-up in
  one call.
- Every process is spawned by this thread and ends before it: PR_SET_PDEATHSIG ties a process to the thread that spawned
  it.
- It reads plain attributes of links (ready, failure, lost, heartbeats) and never data that a dying worker may have half
  written: no requests, no pixels, no segments.
- Workers ignore SIGTERM. An orderly end is a Stop message or a closed link, then SIGKILL after the grace period. A hung
  worker gets SIGKILL at once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait

from ovserve import systemd
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.model_queue import ModelStatus
from ovserve.errors import LaunchError
from ovserve.fleet.desired import DesiredModel, desired_models
from ovserve.fleet.devices import DeviceMemory
from ovserve.fleet.estimates import Estimates
from ovserve.fleet.fleets import Fleet, Slot, load_failure
from ovserve.fleet.reconciler import Outcome, Reconciler
from ovserve.fleet.residency import Limits, ModelView, Residency
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.launcher import Launcher, WorkerProcess, WorkerSpec

__all__ = ["ModelMemory", "Supervisor"]

OnServing = Callable[[ModelProfile, ModelSettings], None]

# Between checks of heartbeats and memory: the precision of a hang limit. A leak of 4 GB/s is seen within 1 GB.
_TICK_S = 0.25
_OVERHEAD_S = 2.0  # between measurements of the memory of the server itself
_OVERHEAD_SHARE = 0.01  # of a core that they may take: they are slow with thousands of threads
_OVERHEAD_MAX_S = 20.0  # between them at most
_STALL_S = 1.0  # a tick this late means that the front end itself stalled: silence of workers until then does not count
_CALL_TIMEOUT_S = 10.0  # for a queued call to be made; a loop iteration takes milliseconds, more if it starts processes
_DISPATCHER_STALL_S = 5.0  # without an iteration of its loop: the dispatcher hangs, and the watchdog is not fed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Memory of one model: what its workers take now, and what one of them is expected to take, in bytes."""

    used_bytes: int
    worker_bytes: int


class Supervisor:
    """Keeps the workers of every model running. Thread-safe: yes.

    Args:
        settings: limits; `settings.models` are the models to serve.
        profiles: each model's profile, by name.
        dispatcher: gets the models, the links and the failures.
        launcher: starts the workers.
        on_serving: called in the supervisor thread with a profile and settings when the workers of a reload have taken
            over, and the old workers get no more jobs.
        estimates: what workers are expected to take; None: measurements are not kept.

    Attributes:
        on_outcome: called in the supervisor thread when `outcomes` has changed.
    """

    def __init__(
        self,
        settings: Settings,
        profiles: Mapping[str, ModelProfile],
        dispatcher: Dispatcher,
        launcher: Launcher,
        on_serving: OnServing | None = None,
        *,
        estimates: Estimates | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._launcher = launcher
        self._on_serving = on_serving
        self.on_outcome: Callable[[], None] | None = None
        self._settings = settings
        self._longest_job_s = settings.max_timeout_s  # maximum over all settings so far: jobs of each may still run
        self._written_off: list[tuple[WorkerProcess, Fleet]] = []  # survived SIGKILL
        self._incarnations: dict[tuple[str, int], int] = {}
        self._restarts: Counter[str] = Counter()
        self._deaths: Counter[tuple[str, str]] = Counter()  # by model and cause
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stop_by: Deadline | None = None
        self._ignore_silence_before = 0.0
        self.turned_at = time.monotonic()  # when the loop last woke
        self._watchdog = systemd.Watchdog()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not closed in `stop`: a late call would write to a descriptor that has been reused.
        weakref.finalize(self, os.close, self._wakeup)
        self._reconciler = Reconciler(dispatcher, self._retire_for_reload, self._note_serving)
        self._residency = Residency()
        self._estimates = estimates or Estimates()
        self._devices = DeviceMemory()
        self._overhead_bytes = 0
        self._measure_overhead_at = 0.0
        self._memory: Mapping[str, ModelMemory] = {}
        self._loads: Counter[str] = Counter()
        self._unloads: Counter[str] = Counter()
        self._change_desired(desired_models(settings, profiles))
        dispatcher.on_change = self._wake
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # --- other threads ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every model's workers."""
        self._launcher.prepare()
        self._thread.start()

    def wait_ready(self, deadline: Deadline) -> bool:
        """Wait until a model has a ready worker, or none is loading and one is loaded on demand.

        Return False when all models have failed, or at the deadline.
        """

        def is_decided() -> bool:
            fleets = self._serving_fleets()
            return any(fleet.ready_slots for fleet in fleets) or not any(map(_is_pending, fleets))

        with self._changed:
            is_over = self._changed.wait_for(is_decided, timeout=deadline.remaining())
            return is_over and any(fleet.ready_slots or not fleet.failure for fleet in self._serving_fleets())

    def status(self) -> dict[str, ModelStatus]:
        """Return the status of each model, by name."""
        return {status.name: status for status in self._dispatcher.statuses()}

    def worker_pids(self) -> dict[str, int]:
        """Return the process id of each live worker, by its name `model/index#incarnation`."""
        return {process.name: process.pid for process in self._live_processes()}

    def _live_processes(self) -> list[WorkerProcess]:
        slots = [slot for fleet in self._reconciler.fleets() for slot in list(fleet.slots)]
        return [slot.process for slot in slots if slot.process and not slot.exit_reason]

    def restarts(self) -> dict[str, int]:
        """Return for each model how many workers have died or been killed since the start, without retired ones."""
        return {name: self._restarts[name] for name in self._dispatcher.models()}

    def deaths(self) -> dict[tuple[str, str], int]:
        """Return how many workers have died or been killed since the start, by model and one of `DEATH_CAUSES`."""
        names = set(self._dispatcher.models())
        return {key: count for key, count in dict(self._deaths).items() if key[0] in names}

    def process_memory(self) -> dict[str, int]:
        """Return the measured memory of the server itself (`server`) and of each worker, by `MODEL/INDEX`."""
        found = {"server": self._overhead_bytes}
        for fleet in self._reconciler.fleets():
            for slot in list(fleet.slots):
                name = f"{fleet.name}/{slot.index}"
                found[name] = found.get(name, 0) + slot.used_bytes  # a reload has two fleets for a while
        return found

    def reload(self, settings: Settings, profiles: Mapping[str, ModelProfile]) -> None:
        """Make the workers agree with these settings.

        A model whose options, files and relevant settings are unchanged keeps its processes. For a changed one new
        workers start beside the old ones; they take over when they are ready, and the old ones drain. Its new options
        apply only then, and if the new workers fail, the old ones stay. A model that the settings no longer name
        finishes its queue and is unloaded.
        """
        desired = desired_models(settings, profiles)
        for name, record in desired.items():
            if name not in self._reconciler.models:  # at once: requests that follow the new catalog may name it
                self._dispatcher.add_model(
                    name, record.model.queue_limit, settings, is_on_demand=record.model.is_lazy, queues_first_load=True
                )
        self._queue_call(lambda: self._set_desired(settings, desired))
        # A request that was checked against the new catalog must not reach workers that are about to be retired.
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, timeout=_CALL_TIMEOUT_S)

    def outcomes(self) -> Mapping[str, Outcome]:
        """Return what has become of each model's options since the start or the newest `reload`, by model name."""
        return self._reconciler.outcomes

    def load(self, name: str, keep_alive_s: float | None) -> None:
        """Load a model without a request.

        Args:
            name: the model's name.
            keep_alive_s: how long it stays after its last job; -1: for ever; None: as its options say.
        """
        kept_s = math.inf if keep_alive_s is not None and keep_alive_s < 0 else keep_alive_s
        self._dispatcher.clear_refusal(name)
        self._call(lambda: self._load(name, kept_s))

    def unload(self, name: str) -> None:
        """Unload a model when its running jobs have ended. The next request loads it again, also if it has failed."""
        self._call(lambda: self._unload(name))

    def loads(self) -> dict[str, int]:
        """Return for each model how often it has become ready after it had no ready worker."""
        return {name: self._loads[name] for name in self._dispatcher.models()}

    def memory(self) -> Mapping[str, ModelMemory]:
        """Return the memory of each model, by name."""
        return self._memory

    def memory_bytes(self) -> int:
        """Return the measured memory of the server and its workers."""
        return self._overhead_bytes + sum(each.used_bytes for each in self._memory.values())

    def budget_bytes(self) -> int:
        """Return the limit of that memory; 0: none."""
        return self._settings.memory_budget_bytes

    def unloads(self) -> dict[str, int]:
        """Return for each model how often it was unloaded while it stayed in the configuration."""
        return {name: self._unloads[name] for name in self._dispatcher.models()}

    def node_workers(self) -> dict[tuple[str, str], int]:
        """Return how many workers are ready on each node of a cluster, by model and node; this machine is no node."""
        found: Counter[tuple[str, str]] = Counter()
        for fleet in self._reconciler.fleets():
            for slot in list(fleet.slots):
                process = slot.process
                if process is not None and slot.is_ready and (node := process.node()):
                    found[fleet.name, node] += 1
        return found

    def log_stacks(self) -> None:
        """Make the workers write the stacks of their threads into the log. Does not wait."""

        def ask() -> None:
            for process in self._live_processes():
                process.log_stacks()

        self._queue_call(ask)

    def wait_reloaded(self, deadline: Deadline) -> bool:
        """Wait until all reloads are complete and the old workers have exited; return False at the deadline."""

        def is_over() -> bool:
            return not self._calls and self._reconciler.is_settled

        with self._changed:
            return self._changed.wait_for(is_over, timeout=deadline.remaining())

    def stop(self, deadline: Deadline) -> None:
        """End all workers: a Stop message now, SIGKILL at the deadline. Idempotent."""
        self._stop_by = deadline
        self._wake()
        if self._thread.is_alive():
            self._thread.join(deadline.remaining() + 2 * self._settings.terminate_timeout_s)
        for process in self._live_processes():
            # The supervisor thread has not ended them. While they run, multiprocessing keeps this process from exiting.
            log.error("worker still running after the stop; killed", extra=fields(worker=process.name, pid=process.pid))
            with contextlib.suppress(ValueError):  # the thread has reaped it meanwhile
                process.kill()

    # --- the supervisor thread ----------------------------------------------------------------------------------------

    def _set_desired(self, settings: Settings, desired: Mapping[str, DesiredModel]) -> None:
        if self._stop_by is not None:
            return
        self._settings = settings
        self._longest_job_s = max(self._longest_job_s, settings.max_timeout_s)
        self._change_desired(desired)

    def _change_desired(self, desired: Mapping[str, DesiredModel]) -> None:
        self._reconciler.set_desired(desired)
        self._residency.configure(record.model for record in desired.values())
        self._reconcile(time.monotonic())

    def _reconcile(self, now: float) -> None:
        """Decide how many workers each model should have, then take the steps towards that."""
        before, views = self._reconciler.workers(), self._views()
        overhead, devices = self._measured_overhead(now), self._devices.totals
        limits = Limits(self._settings.memory_budget_bytes, overhead, self._settings.min_resident_s, devices)
        decision = self._residency.decide(now, views, limits)
        self._memory = {view.name: ModelMemory(view.used_bytes, view.worker_bytes) for view in views}
        load_s = {record.name: self._estimates.load_s(record) for record in self._reconciler.records()}
        self._reconciler.set_workers(decision.workers, load_s)
        for name, reason in decision.refused.items():
            self._dispatcher.reject_queued(name, reason)
        self._dispatcher.set_waiting(decision.waiting)
        self._dispatcher.set_unplaced(self._unplaced())
        spare = math.inf if decision.spare_bytes is None else decision.spare_bytes
        spare_devices = decision.spare_devices

        def has_room(record: DesiredModel, count: int) -> bool:
            needs = self._devices.needs(record)
            if any(count * size > spare_devices.get(device, math.inf) for device, size in needs.items()):
                return False
            return count * self._estimates.worker_bytes(record) <= spare

        self._reconciler.has_room = has_room
        self._unloads.update(name for name, count in before.items() if count and decision.workers.get(name) == 0)
        self._reconciler.reconcile()

    def _unplaced(self) -> dict[str, str]:
        """Return why the models that have no ready worker wait for a place in a cluster, by name."""
        found = {}
        for entry in self._reconciler.models.values():
            slots = [slot for fleet in entry for slot in fleet.slots]
            reasons = [slot.process.waits_for() for slot in slots if slot.process and not slot.exit_reason]
            if any(reasons) and not any(slot.is_ready for slot in slots):
                found[entry.serving.name] = next(filter(None, reasons))
        return found

    def _measured_overhead(self, now: float) -> int:
        """Return the memory of this program without its workers, measured every _OVERHEAD_S or more rarely."""
        if now >= self._measure_overhead_at:
            begun_s = time.thread_time()  # CPU time: a thread that had to wait is no reason to wait longer
            self._overhead_bytes = self._launcher.overhead_bytes()
            wait_s = (time.thread_time() - begun_s) / _OVERHEAD_SHARE
            self._measure_overhead_at = now + min(_OVERHEAD_MAX_S, max(_OVERHEAD_S, wait_s))
        return self._overhead_bytes

    def _views(self) -> list[ModelView]:
        """Return what the residency policy sees of each model that is desired."""
        statuses = self.status()
        views = []
        for name, entry in self._reconciler.models.items():
            if entry.is_removed or name not in statuses:
                continue
            status, slots = statuses[name], [slot for fleet in entry for slot in fleet.slots]
            record = self._reconciler.record(name)
            views.append(
                ModelView(
                    options=record.model,
                    queued=status.queued,
                    running=status.running,
                    last_used_at=status.last_used_at,
                    processes=sum(slot.process is not None for slot in slots),
                    ready=sum(slot.is_ready for slot in slots),
                    capacity=status.capacity,
                    is_failed=bool(entry.serving.failure),
                    used_bytes=sum(slot.used_bytes for slot in slots),
                    worker_bytes=self._estimates.worker_bytes(record),
                    keep_alive_s=status.keep_alive_s,
                    device_bytes=self._devices.needs(record),
                )
            )
        return views

    def _load(self, name: str, keep_alive_s: float | None) -> None:
        self._residency.load(name, keep_alive_s)
        if self._reconciler.forget_failure(name):
            self._dispatcher.clear_failure(name)

    def _unload(self, name: str) -> None:
        self._residency.unload(name)
        self._reconciler.forget_failure(name)
        self._dispatcher.clear_failure(name)

    def _note_serving(self, record: DesiredModel) -> None:
        if self._on_serving:
            self._on_serving(record.profile, record.model)

    def _serving_fleets(self) -> list[Fleet]:
        return [entry.serving for entry in list(self._reconciler.models.values()) if not entry.is_removed]

    def _retire_for_reload(self, slot: Slot) -> None:
        self._retire(slot, self._drain_end())

    def _call(self, call: Callable[[], None]) -> None:
        """Make a call in the supervisor thread, and wait until it was made."""
        self._queue_call(call)
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, timeout=_CALL_TIMEOUT_S)

    def _queue_call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
                    self._launcher.close()
                    return
            except Exception:
                # A bug. All workers would die with this thread (PR_SET_PDEATHSIG): continue, but not in a tight loop.
                log.exception("supervisor: an iteration of its loop failed")
                time.sleep(0.5)

    def _turn(self) -> bool:
        """Make the queued calls, update every slot, wait for an event. Return False when all workers have stopped."""
        while self._calls:
            try:
                self._calls[0]()
            finally:
                self._calls.popleft()  # not before: `reload` and `wait_reloaded` wait for an empty list
        now, outcomes = time.monotonic(), self._reconciler.outcomes
        ready = {fleet.name for fleet in self._reconciler.fleets() if fleet.ready_slots}
        for fleet in self._reconciler.fleets():
            for slot in list(fleet.slots):
                self._update(slot, now)
        if self._stop_by is None:
            self._loads.update(
                {fleet.name for fleet in self._reconciler.fleets() if fleet.ready_slots} - ready  # each name once
            )
            self._reconcile(now)
            if self.on_outcome and self._reconciler.outcomes != outcomes:
                self.on_outcome()
        self._reap_written_off()
        with self._changed:
            self._changed.notify_all()
        if now - self._dispatcher.polled_at < _DISPATCHER_STALL_S:
            self._watchdog.feed()
        if self._stop_by is not None and self._is_stopped(now):
            return False
        self._wait()
        return True

    def _wait(self) -> None:
        slots = [slot for fleet in self._reconciler.fleets() for slot in fleet.slots]
        sentinels = [slot.process.readiness for slot in slots if slot.process and not slot.exit_reason]
        sentinels += [process.readiness for process, _ in self._written_off]
        before = time.monotonic()
        waiting = [slot for slot in slots if not slot.process and self._reconciler.may_start(slot)]
        due = min((slot.restart_at for slot in waiting), default=float("inf"))
        timeout_s = max(0.0, min(_TICK_S, due - before))
        if self._wakeup in wait([self._wakeup, *sentinels], timeout=timeout_s):
            os.eventfd_read(self._wakeup)
        self.turned_at = time.monotonic()
        if self.turned_at - before > _TICK_S + _STALL_S:
            self._ignore_silence_before = self.turned_at

    def _update(self, slot: Slot, now: float) -> None:
        """Start, watch, reap or remove a slot's worker, whichever is due."""
        if self._stop_by is not None:
            self._retire(slot, self._stop_by.at)
        if slot.process is None:
            if slot.is_retired:
                slot.fleet.slots.remove(slot)
            elif now >= slot.restart_at and self._reconciler.may_start(slot):
                self._start(slot)
            return
        if slot.exit_reason:
            self._finish_exit(slot)
            return
        if slot.process.is_alive():
            if now >= slot.write_off_at:
                self._write_off(slot)
            else:
                self._watch(slot, now)
            return
        self._note_exit(slot)
        self._finish_exit(slot)

    def _start(self, slot: Slot) -> None:
        fleet = slot.fleet
        key = (fleet.name, slot.index)
        incarnation = self._incarnations.get(key, 0)
        self._incarnations[key] = incarnation + 1
        try:
            process, link = self._launcher.start(
                WorkerSpec(
                    fleet.desired.profile, fleet.model, WorkerSettings.of(fleet.settings), slot.index, incarnation
                )
            )
        except Exception as error:  # whatever a launcher is missing, the other slots go on
            if not isinstance(error, LaunchError):
                log.exception("launcher failed", extra=fields(model=fleet.name))
            slot.deaths += 1
            slot.restart_at = time.monotonic() + slot.backoff_s()
            log.warning("worker cannot be started", extra=fields(model=fleet.name, index=slot.index, why=str(error)))
            return
        slot.assign(process, link, time.monotonic())
        self._dispatcher.attach(link, fleet.settings)
        log.info("worker started", extra=fields(worker=link.name, pid=process.pid))

    # --- live workers -------------------------------------------------------------------------------------------------

    def _watch(self, slot: Slot, now: float) -> None:
        process, link, fleet = slot.process, slot.link, slot.fleet
        if process is None or link is None:
            return
        resident = process.resident_bytes()
        if link.state.ready is not None and not slot.ready_at and not slot.is_retired and not slot.is_killed:
            self._note_ready(slot, now, resident)
        # A killed process that takes long to exit, because it frees much memory, keeps the reason of its kill.
        if link.state.lost and slot.kill_at == float("inf") and not slot.is_killed:
            slot.kill_at = now if link.state.is_broken else now + fleet.settings.terminate_timeout_s
            slot.kill_reason = link.state.lost if link.state.is_broken else ""
        slot.measure(now, resident)
        if slot.ready_at and slot.peak_bytes > self._estimates.worker_bytes(fleet.desired):
            self._estimates.note(fleet.desired, slot.peak_bytes)
        # What the dispatcher has not read is no silence.
        silence_s = self._dispatcher.polled_at - max(link.state.beat_at, self._ignore_silence_before)
        if now >= slot.kill_at:
            self._kill(slot, "overdue", slot.kill_reason or "did not exit within its grace period")
            return
        cause, reason = slot.exceeded_limit(link, silence_s, resident, process.machine_bytes() * 3 // 4)
        if cause:
            self._kill(slot, cause, reason)

    def _note_ready(self, slot: Slot, now: float, resident_bytes: int) -> None:
        fleet, link = slot.fleet, slot.link
        if link is None or link.state.ready is None:
            return
        fleet.note_ready(slot, link, now)
        took_s = round(now - slot.started_at, 2)
        slot.measure_at = slot.measure_by = 0.0
        slot.measure(now, resident_bytes)
        self._estimates.note(fleet.desired, slot.peak_bytes, now - slot.started_at)
        self._estimates.write()
        found = link.state.ready
        if slot.process is not None and not slot.process.node():
            self._devices.note(found.devices)
        where = {"node": slot.process.node()} if slot.process and slot.process.node() else {}
        if fleet.desired.profile.plan is not None:
            where["plan"] = str(fleet.desired.profile.plan)
        log.info(
            "worker ready",
            extra=fields(
                worker=link.name,
                seconds=took_s,
                engine=found.engine,
                why=found.why,
                capacity=found.capacity,
                **where,
            ),
        )

    def _kill(self, slot: Slot, cause: str, reason: str) -> None:
        if slot.process is None or slot.link is None or slot.is_killed:
            return
        slot.is_killed, slot.kill_reason, slot.kill_cause = True, reason, cause
        self._dispatcher.retire(slot.link)  # no jobs from now on: the process may take long to exit
        slot.process.kill()
        slot.write_off_at = time.monotonic() + slot.fleet.settings.terminate_timeout_s
        log.warning("worker killed", extra=fields(worker=slot.process.name, pid=slot.process.pid, why=reason))

    def _retire(self, slot: Slot, kill_at: float) -> None:
        """Give the worker no more jobs, stop it in order, and kill it at `kill_at`.

        A worker that is still loading does not read messages, so it gets only `terminate_timeout_s`.
        """
        if slot.is_retired:
            slot.kill_at = min(slot.kill_at, kill_at)
            return
        slot.is_retired = True
        if slot.link is None:
            return
        if slot.link.state.ready is None:  # `ready_at` is set later than the dispatcher assigns the first job
            kill_at = min(kill_at, time.monotonic() + slot.fleet.settings.terminate_timeout_s)
        slot.kill_at = min(slot.kill_at, kill_at)
        self._dispatcher.retire(slot.link)

    # --- dead workers -------------------------------------------------------------------------------------------------

    def _write_off(self, slot: Slot) -> None:
        """Treat a process that survived SIGKILL as dead, because its slot and its jobs cannot wait for the driver."""
        if slot.link is None or slot.process is None:
            return
        slot.exit_reason = f"{slot.kill_reason}; survived SIGKILL"
        log.error("worker survived SIGKILL; written off", extra=fields(worker=slot.process.name, pid=slot.process.pid))
        self._dispatcher.detach(slot.link, slot.exit_reason)

    def _reap_written_off(self) -> None:
        for process, fleet in [each for each in self._written_off if not each[0].is_alive()]:
            self._written_off.remove((process, fleet))
            fleet.written_off -= 1
            log.info("written-off worker exited", extra=fields(worker=process.name, pid=process.pid))
            process.close()

    def _note_exit(self, slot: Slot) -> None:
        """Record why the process has exited, and have the dispatcher read its last reports and detach it."""
        if slot.process is None or slot.link is None:
            return
        reason = slot.process.exit_reason()
        slot.exit_reason = slot.kill_reason or reason
        self._dispatcher.detach(slot.link, slot.exit_reason)

    def _finish_exit(self, slot: Slot) -> None:
        """Count the death and schedule the restart, once the dispatcher has detached the worker (`lost` is set)."""
        process, link, fleet = slot.process, slot.link, slot.fleet
        if process is None or link is None or not link.state.lost:
            return
        now, reason = time.monotonic(), load_failure(link) or slot.exit_reason
        if process.is_alive():
            self._written_off.append((process, fleet))
            fleet.written_off += 1
        else:
            process.close()
        if slot.ready_at and link.state.jobs_done and slot.peak_bytes:
            self._estimates.note(fleet.desired, slot.peak_bytes, is_final=True)
            self._estimates.write()
        if slot.is_retired:
            slot.clear()
            log.info("worker exited", extra=fields(worker=link.name, why=slot.exit_reason))
            return
        failed_before = fleet.failure
        fleet.note_death(slot, link, reason, now)
        self._restarts[fleet.name] += 1
        self._deaths[fleet.name, slot.death_cause(link)] += 1
        delay_s = slot.backoff_s()
        slot.restart_at = now + delay_s
        log.warning(
            "worker died",
            extra=fields(
                worker=link.name, pid=process.pid, why=reason, deaths=fleet.deaths, restart_s=round(delay_s, 2)
            ),
        )
        if fleet.failure != failed_before:
            log.error("model failed", extra=fields(model=fleet.name, why=fleet.failure))
            self._reconciler.note_failure(fleet)

    # --- stop ---------------------------------------------------------------------------------------------------------

    def _drain_end(self) -> float:
        """Return when a worker that drains for a reload is killed: no job lives longer than the longest deadline."""
        return time.monotonic() + self._longest_job_s + self._settings.terminate_timeout_s

    def _is_stopped(self, now: float) -> bool:
        live = [slot.process for fleet in self._reconciler.fleets() for slot in fleet.slots if slot.process]
        if not live:
            return True
        if self._stop_by and now > self._stop_by.at + self._settings.terminate_timeout_s:
            for process in live:  # a driver blocks it in an uninterruptible call
                log.error("worker survived SIGKILL", extra=fields(worker=process.name, pid=process.pid))
            return True
        return False


def _is_pending(fleet: Fleet) -> bool:
    """Return whether a fleet should have workers, and none of them has been ready yet or has failed."""
    return bool(fleet.desired.workers) and not fleet.failure
