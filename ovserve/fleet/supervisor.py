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
import os
import signal
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait

from ovserve import systemd
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.model_queue import ModelStatus
from ovserve.errors import ModelNotFound
from ovserve.fleet.fleets import Fleet, Slot, load_failure, make_fleets
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.launcher import Launcher, WorkerProcess, WorkerSpec

__all__ = ["Supervisor"]

OnServing = Callable[[ModelProfile, ModelSettings], None]

# Between checks of heartbeats and memory: the precision of a hang limit. A leak of 4 GB/s is seen within 1 GB.
_TICK_S = 0.25
_STALL_S = 1.0  # a tick this late means that the front end itself stalled: silence of workers until then does not count
_CALL_TIMEOUT_S = 10.0  # for a queued call to be made; a loop iteration takes milliseconds, more if it starts processes
_DISPATCHER_STALL_S = 5.0  # without an iteration of its loop: the dispatcher hangs, and the watchdog is not fed

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps the workers of every model running. Thread-safe: yes.

    Args:
        settings: limits; `settings.models` are the models to serve.
        profiles: each model's profile, by name.
        dispatcher: gets the models, the links and the failures.
        launcher: starts the workers.
        on_serving: called in the supervisor thread with a profile and settings when the workers of a reload have taken
            over, and the old workers get no more jobs.
    """

    def __init__(
        self,
        settings: Settings,
        profiles: Mapping[str, ModelProfile],
        dispatcher: Dispatcher,
        launcher: Launcher,
        on_serving: OnServing | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._launcher = launcher
        self._on_serving = on_serving
        self._settings = settings
        self._longest_job_s = settings.max_timeout_s  # maximum over all settings so far: jobs of each may still run
        self._incoming: dict[str, Fleet] = {}  # fleets of a reload that have not taken over yet
        self._unloading: list[Fleet] = []  # fleets of removed models with unfinished jobs
        self._retiring: list[Fleet] = []  # fleets whose slots are all retired
        self._written_off: list[tuple[WorkerProcess, Fleet]] = []  # survived SIGKILL
        self._incarnations: dict[tuple[str, int], int] = {}
        self._restarts: Counter[str] = Counter()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stop_by: Deadline | None = None
        self._ignore_silence_before = 0.0
        self._memory_limit_bytes = launcher.memory_bytes() * 3 // 4
        self.turned_at = time.monotonic()  # when the loop last woke
        self._watchdog = systemd.Watchdog()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not closed in `stop`: a late call would write to a descriptor that has been reused.
        weakref.finalize(self, os.close, self._wakeup)
        for model in settings.models:
            dispatcher.add_model(model.name, model.queue_limit)
        self._fleets = make_fleets(settings, profiles)  # the serving fleet of each model
        dispatcher.on_change = self._wake
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # --- other threads ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every model's workers."""
        self._launcher.prepare()
        self._thread.start()

    def wait_ready(self, deadline: Deadline) -> bool:
        """Wait until a model has a ready worker; return False when all models have failed, or at the deadline."""

        def is_decided() -> bool:
            fleets = list(self._fleets.values())  # a reload may change it meanwhile
            return any(fleet.ready_slots for fleet in fleets) or all(fleet.failure for fleet in fleets)

        with self._changed:
            self._changed.wait_for(is_decided, timeout=deadline.remaining())
            return any(fleet.ready_slots for fleet in list(self._fleets.values()))

    def status(self) -> dict[str, ModelStatus]:
        """Return the status of each model, by name."""
        return {status.name: status for status in self._dispatcher.statuses()}

    def worker_pids(self) -> dict[str, int]:
        """Return the process id of each live worker, by its name `model/index#incarnation`."""
        fleets = [*self._fleets.values(), *self._incoming.values(), *self._unloading, *self._retiring]
        slots = [slot for fleet in fleets for slot in list(fleet.slots)]
        return {slot.process.name: slot.process.pid for slot in slots if slot.process and not slot.exit_reason}

    def restarts(self) -> dict[str, int]:
        """Return for each model how many workers have died or been killed since the start, without retired ones."""
        return {name: self._restarts[name] for name in self._dispatcher.models()}

    def reload(self, settings: Settings, profiles: Mapping[str, ModelProfile]) -> None:
        """Start new workers with these settings beside the old ones; they take over when ready, and the old ones drain.

        A model's own settings apply only when its new workers have taken over. A model whose new workers fail keeps the
        old ones. Models that the settings no longer name finish their queue and are unloaded.
        """
        self._add_models(settings)  # at once: requests that follow the new catalogue may name them
        self._queue_call(lambda: self._reload(settings, profiles))
        # A request that was checked against the new catalogue must not reach workers that are about to be retired.
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, timeout=_CALL_TIMEOUT_S)

    def _add_models(self, settings: Settings) -> None:
        """Add every model to the dispatcher, with the queue limit of the workers that serve it."""
        for model in settings.models:
            serving = self._fleets.get(model.name)
            limit = serving.model.queue_limit if serving else model.queue_limit
            self._dispatcher.add_model(model.name, limit, settings)

    def wait_reloaded(self, deadline: Deadline) -> bool:
        """Wait until all reloads are complete and the old workers have exited; return False at the deadline."""

        def is_over() -> bool:
            return not self._calls and not self._incoming and not self._unloading and not self._retiring

        with self._changed:
            return self._changed.wait_for(is_over, timeout=deadline.remaining())

    def stop(self, deadline: Deadline) -> None:
        """End all workers: a Stop message now, SIGKILL at the deadline. Idempotent."""
        self._stop_by = deadline
        self._wake()
        if self._thread.is_alive():
            self._thread.join(deadline.remaining() + 2 * self._settings.terminate_timeout_s)
        for name, pid in self.worker_pids().items():
            # The supervisor thread has not ended them. While they run, multiprocessing keeps this process from exiting.
            log.error("worker still running after the stop; killed", extra=fields(worker=name, pid=pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- the supervisor thread ----------------------------------------------------------------------------------------

    def _queue_call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
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
        now = time.monotonic()
        for fleet in self._all_fleets():
            for slot in list(fleet.slots):
                self._update(slot, now)
        self._advance_reload()
        self._reap_written_off()
        with self._changed:
            self._changed.notify_all()
        if now - self._dispatcher.polled_at < _DISPATCHER_STALL_S:
            self._watchdog.feed()
        if self._stop_by is not None and self._is_stopped(now):
            return False
        self._wait()
        return True

    def _all_fleets(self) -> list[Fleet]:
        return [*self._fleets.values(), *self._incoming.values(), *self._unloading, *self._retiring]

    def _wait(self) -> None:
        slots = [slot for fleet in self._all_fleets() for slot in fleet.slots]
        sentinels = [slot.process.readiness for slot in slots if slot.process and not slot.exit_reason]
        sentinels += [process.readiness for process, _ in self._written_off]
        before = time.monotonic()
        waiting = [slot for slot in slots if not slot.process and self._may_start(slot)]
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
            elif now >= slot.restart_at and self._may_start(slot):
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

    def _may_start(self, slot: Slot) -> bool:
        """Return whether a slot's worker may be started now.

        Not while workers that a previous reload has retired are still loading: otherwise each reload in a row would add
        another model that loads at the same time, and takes memory and cores.
        """
        fleet = slot.fleet
        is_incoming = fleet is self._incoming.get(fleet.name)
        if is_incoming and any(old.name == fleet.name and old.is_loading for old in self._retiring):
            return False
        return fleet.may_start(slot)

    def _start(self, slot: Slot) -> None:
        fleet = slot.fleet
        key = (fleet.name, slot.index)
        incarnation = self._incarnations.get(key, 0)
        self._incarnations[key] = incarnation + 1
        try:
            process, link = self._launcher.start(
                WorkerSpec(fleet.profile, fleet.model, WorkerSettings.of(fleet.settings), slot.index, incarnation)
            )
        except OSError as error:  # no descriptors, memory or process ids left: back off in each case
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
        if link.state.ready is not None and not slot.ready_at and not slot.is_retired and not slot.is_killed:
            self._note_ready(slot, now)
        if link.state.lost and slot.kill_at == float("inf"):
            slot.kill_at = now if link.state.is_broken else now + fleet.settings.terminate_timeout_s
            slot.kill_reason = link.state.lost if link.state.is_broken else ""
        # What the dispatcher has not read is no silence.
        silence_s = self._dispatcher.polled_at - max(link.state.beat_at, self._ignore_silence_before)
        resident = process.resident_bytes()
        if now >= slot.kill_at:
            self._kill(slot, slot.kill_reason or "did not exit within its grace period")
        elif reason := slot.exceeded_limit(link, silence_s, resident, self._memory_limit_bytes):
            self._kill(slot, reason)

    def _note_ready(self, slot: Slot, now: float) -> None:
        fleet, link = slot.fleet, slot.link
        if link is None or link.state.ready is None:
            return
        fleet.note_ready(slot, link, now)
        self._dispatcher.clear_failure(fleet.name)
        took_s = round(now - slot.started_at, 2)
        found = link.state.ready
        log.info(
            "worker ready",
            extra=fields(worker=link.name, seconds=took_s, engine=found.engine, why=found.why, capacity=found.capacity),
        )

    def _kill(self, slot: Slot, reason: str) -> None:
        if slot.process is None or slot.link is None or slot.is_killed:
            return
        slot.is_killed, slot.kill_reason = True, reason
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
        if not slot.ready_at:
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
        if slot.is_retired:
            slot.clear()
            log.info("worker exited", extra=fields(worker=link.name, why=slot.exit_reason))
            return
        failed_before = fleet.failure
        fleet.note_death(slot, link, reason, now)
        self._restarts[fleet.name] += 1
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
            successor = self._incoming.get(fleet.name)
            has_successor = successor is not None and successor.ready_slots
            # The serving fleet of its model, or one that is being unloaded.
            if self._fleets.get(fleet.name, fleet) is fleet and not has_successor:
                self._dispatcher.fail_model(fleet.name, fleet.failure)

    # --- reload and stop ----------------------------------------------------------------------------------------------

    def _reload(self, settings: Settings, profiles: Mapping[str, ModelProfile]) -> None:
        if self._stop_by is not None:
            return
        for fleet in list(self._incoming.values()):
            self._abort_incoming(fleet)
        self._settings = settings
        self._longest_job_s = max(self._longest_job_s, settings.max_timeout_s)
        names = {model.name for model in settings.models}
        self._add_models(settings)  # again: a removal of the same name may have happened since `reload`
        for fleet in [fleet for fleet in self._unloading if fleet.name in names]:
            self._unloading.remove(fleet)
            self._retire_fleet(fleet)  # queued jobs and later requests are for the new workers
        for name in [name for name in self._fleets if name not in names]:
            self._dispatcher.remove_model(name)
            self._unloading.append(self._fleets.pop(name))
        for name, fleet in make_fleets(settings, profiles).items():
            (self._incoming if name in self._fleets else self._fleets)[name] = fleet

    def _advance_reload(self) -> None:
        """Replace old workers by new ones that are ready, and retire fleets of removed models that have finished."""
        for name, fleet in list(self._incoming.items()):
            # A new fleet with some ready workers is better than an old one with none.
            is_needed = fleet.ready_slots and not self._fleets[name].ready_slots
            if failure := fleet.failure or ("" if is_needed else fleet.crash_loop_reason):
                log.error("reload failed, the old workers stay", extra=fields(model=name, why=failure))
                self._abort_incoming(fleet)
                continue
            old, ready = self._fleets[name], len(fleet.ready_slots)
            active = sorted(old.active_slots, key=lambda slot: slot.is_ready)  # not ready: retired first
            keep = 0 if ready == fleet.model.replicas else max(0, old.model.replicas - ready)
            for slot in active[: max(0, len(active) - keep)]:
                self._retire(slot, self._drain_end())
            if not keep:
                self._take_over(fleet)
        for fleet in list(self._unloading):
            if fleet.failure or self._unfinished_jobs(fleet.name) == 0:
                self._unloading.remove(fleet)
                self._retire_fleet(fleet)
                self._dispatcher.remove_model(fleet.name)  # again: without workers, no other event removes it
        self._retiring = [fleet for fleet in self._retiring if fleet.slots]

    def _take_over(self, fleet: Fleet) -> None:
        """Make a reload's fleet the serving one. All old workers are retired, so new jobs go to the new ones."""
        name = fleet.name
        del self._incoming[name]
        self._retire_fleet(self._fleets[name])
        self._fleets[name] = fleet
        self._dispatcher.add_model(name, fleet.model.queue_limit)
        if self._on_serving:
            self._on_serving(fleet.profile, fleet.model)
        log.info("new workers have taken over", extra=fields(model=name))

    def _abort_incoming(self, fleet: Fleet) -> None:
        """Retire a reload's fleet that failed or was replaced by a newer one, and recreate the old fleet's slots."""
        del self._incoming[fleet.name]
        self._retire_fleet(fleet)
        old = self._fleets[fleet.name]
        old.recreate_slots()
        if old.failure and not old.ready_slots:
            self._dispatcher.fail_model(old.name, old.failure)

    def _retire_fleet(self, fleet: Fleet) -> None:
        for slot in fleet.slots:
            self._retire(slot, self._drain_end())
        self._retiring.append(fleet)

    def _drain_end(self) -> float:
        """Return when a worker that drains for a reload is killed: no job lives longer than the longest deadline."""
        return time.monotonic() + self._longest_job_s + self._settings.terminate_timeout_s

    def _unfinished_jobs(self, model: str) -> int:
        """Return how many jobs are queued or running; a running job is requeued if its worker dies."""
        try:
            status = self._dispatcher.status(model)
            return status.queued + status.running
        except ModelNotFound:
            return 0

    def _is_stopped(self, now: float) -> bool:
        live = [slot.process for fleet in self._all_fleets() for slot in fleet.slots if slot.process]
        if not live:
            return True
        if self._stop_by and now > self._stop_by.at + self._settings.terminate_timeout_s:
            for process in live:  # a driver blocks it in an uninterruptible call
                log.error("worker survived SIGKILL", extra=fields(worker=process.name, pid=process.pid))
            return True
        return False
