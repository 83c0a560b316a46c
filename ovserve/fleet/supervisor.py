"""Sole owner of the worker processes: spawns them, watches them, kills the hung, restarts the dead with back-off.

    fleet = the workers of one model in one configuration; slot = one of its `replicas`, filled by one incarnation at a time

    waiting ──restart_at──▶ starting ──Ready──▶ ready ──retire──▶ stopping
       ▲                        │                  │                  │
       └────────── died ◀───────┴──────────────────┘             gone (or killed at end_by)

    A process that SIGKILL does not end is one that has died, to all but `_unkillable`: a driver holds it in an uninterruptible call.

Laws of this file:
- One thread does everything; other threads leave an order and wake it. It waits on every process, and on the wake-up, in one call.
- Every process is spawned by this thread and ends before it: PR_SET_PDEATHSIG ties a process to the thread that made it.
- It reads plain values from links (ready, failure, lost, beats) and never what a dying worker may have left half-written; no
  requests, no pixels, no segments.
- Workers ignore SIGTERM: an orderly end is a Stop message or a closed link, and after a grace SIGKILL. The hung get that at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from ovserve import systemd
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.model_queue import ModelStatus
from ovserve.errors import ModelNotFound
from ovserve.fleet import processes
from ovserve.fleet.fleets import Fleet, Slot, load_failure, make_fleets
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.pipes import Link, WorkerEnd, open_link

__all__ = ["Supervisor", "WorkerMain"]

WorkerMain = Callable[[WorkerEnd, ModelProfile, ModelSettings, Settings], None]
OnServing = Callable[[ModelProfile, ModelSettings], None]

_TICK_S = 0.25  # between looks at beats and memory: a hang limit is kept to this, a leak of 4 GB/s seen within 1 GB
_LATE_S = 1.0  # a tick this late means that the front end itself stood still: silence heard then is its own
_ORDER_S = 10.0  # for an order to be taken; a turn takes milliseconds, and some more where it starts processes
_DISPATCHER_LATE_S = 5.0  # then it stands still, and the watchdog is not fed

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps the workers of every model running. Thread-safe: yes.

    Args:
        settings: limits; `settings.models` are the models to serve.
        profiles: each model's profile, by name.
        dispatcher: told of models, links and failures.
        worker_main: the spawn target, importable by name: `worker_main(end, profile, model_settings, settings)`.
        on_serving: told in the supervisor thread that workers of this profile and settings have taken over from others, the
            last of which gets no more jobs.
    """

    def __init__(
        self,
        settings: Settings,
        profiles: Mapping[str, ModelProfile],
        dispatcher: Dispatcher,
        worker_main: WorkerMain,
        on_serving: OnServing | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._worker_main = worker_main
        self._on_serving = on_serving
        self._context = multiprocessing.get_context("spawn")
        self._settings = settings
        self._longest_job_s = settings.max_timeout_s  # under any settings there were: jobs of each may still run
        self._incoming: dict[str, Fleet] = {}  # those of a reload that are to take over
        self._leaving: list[Fleet] = []  # those of removed models with jobs still to finish
        self._outgoing: list[Fleet] = []  # those whose slots are all retired
        self._unkillable: list[tuple[SpawnProcess, Fleet]] = []  # killed in vain, and done without
        self._incarnations: dict[tuple[str, int], int] = {}
        self._restarts: Counter[str] = Counter()
        self._orders: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stop_by: Deadline | None = None
        self._ignore_silence_before = 0.0
        self._memory_limit = processes.machine_memory_bytes() * 3 // 4
        self.turned_at = time.monotonic()  # when the loop last turned; systemd's watchdog is fed by it
        self._watchdog = systemd.Watchdog()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not in `stop`: a late order would write to whoever got the number.
        weakref.finalize(self, os.close, self._wakeup)
        for model in settings.models:
            dispatcher.add_model(model.name, model.queue_limit)
        self._fleets = make_fleets(settings, profiles)  # those that serve
        dispatcher.on_change = self._wake
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # --- other threads ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every model's workers."""
        resource_tracker.ensure_running()  # its first start unblocks signals in the thread that makes it: not in ours
        self._thread.start()

    def wait_ready(self, deadline: Deadline) -> bool:
        """Wait until a model has a worker that has worked; False when every model has failed, or at the deadline."""

        def is_decided() -> bool:
            fleets = list(self._fleets.values())  # a reload may come in between
            return any(fleet.ready_slots for fleet in fleets) or all(fleet.failure for fleet in fleets)

        with self._changed:
            self._changed.wait_for(is_decided, timeout=deadline.remaining())
            return any(fleet.ready_slots for fleet in list(self._fleets.values()))

    def status(self) -> dict[str, ModelStatus]:
        """How each model stands, by name."""
        return {status.name: status for status in self._dispatcher.statuses()}

    def worker_pids(self) -> dict[str, int]:
        """The process id of each living worker, by its name `model/index#incarnation`."""
        fleets = [*self._fleets.values(), *self._incoming.values(), *self._leaving, *self._outgoing]
        slots = [slot for fleet in fleets for slot in list(fleet.slots)]
        return {slot.link.name: slot.pid for slot in slots if slot.link and slot.pid and not slot.exit_reason}

    def restarts(self) -> dict[str, int]:
        """By model: workers that died, or were killed, and whose slots were to be filled again, since the start."""
        return {name: self._restarts[name] for name in self._dispatcher.models()}

    def reload(self, settings: Settings, profiles: Mapping[str, ModelProfile]) -> None:
        """Bring in new settings: new workers start beside the old, take over when ready, then the old ones finish and end.

        Of a model's own settings none holds before its new workers have taken over. A model whose new workers fail keeps its
        old ones; models that are no longer named finish their queue and go.
        """
        self._announce(settings)  # at once: whoever reads the new catalogue may ask for them
        self._order(lambda: self._reload(settings, profiles))
        # A request checked by the new catalogue must not meet workers that are still to be sent away.
        with self._changed:
            self._changed.wait_for(lambda: not self._orders, timeout=_ORDER_S)

    def _announce(self, settings: Settings) -> None:
        """Have the dispatcher know every model, with the queue limit of the workers that serve it."""
        for model in settings.models:
            serving = self._fleets.get(model.name)
            limit = serving.model.queue_limit if serving else model.queue_limit
            self._dispatcher.add_model(model.name, limit, settings)

    def wait_reloaded(self, deadline: Deadline) -> bool:
        """Wait until no new workers are on their way in and no old ones on their way out; False at the deadline."""

        def is_over() -> bool:
            return not self._orders and not self._incoming and not self._leaving and not self._outgoing

        with self._changed:
            return self._changed.wait_for(is_over, timeout=deadline.remaining())

    def stop(self, deadline: Deadline) -> None:
        """End every worker: a Stop message, and SIGKILL for those that still run at the deadline. Safe to call twice."""
        self._stop_by = deadline
        self._wake()
        if self._thread.is_alive():
            self._thread.join(deadline.remaining() + 2 * self._settings.terminate_timeout_s)
        for name, pid in self.worker_pids().items():
            # The thread did not manage. Left alive, they would keep multiprocessing from letting the interpreter end.
            log.error("worker left over", extra=fields(worker=name, pid=pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- the supervisor thread ----------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
                    return
            except Exception:
                # A bug. Every worker hangs on this thread (PR_SET_PDEATHSIG): go on, not in a tight loop.
                log.exception("supervisor: a turn failed")
                time.sleep(0.5)

    def _turn(self) -> bool:
        """Wait for something to happen, then look after every slot. False when everything has been stopped."""
        while self._orders:
            try:
                self._orders[0]()
            finally:
                self._orders.popleft()  # not before: `wait_reloaded` waits for an empty list
        now = time.monotonic()
        for fleet in self._all_fleets():
            for slot in list(fleet.slots):
                self._check(slot, now)
        self._change_over()
        self._reap_unkillable()
        with self._changed:
            self._changed.notify_all()
        if now - self._dispatcher.polled_at < _DISPATCHER_LATE_S:
            self._watchdog.feed()
        if self._stop_by is not None and self._is_stopped(now):
            return False
        self._wait()
        return True

    def _all_fleets(self) -> list[Fleet]:
        return [*self._fleets.values(), *self._incoming.values(), *self._leaving, *self._outgoing]

    def _wait(self) -> None:
        living = [p.process.sentinel for f in self._all_fleets() for p in f.slots if p.process and not p.exit_reason]
        living += [process.sentinel for process, _ in self._unkillable]
        before = time.monotonic()
        waiting = [p for f in self._all_fleets() for p in f.slots if not p.process and self._may_start(p)]
        due = min((slot.restart_at for slot in waiting), default=float("inf"))
        timeout_s = max(0.0, min(_TICK_S, due - before))
        if self._wakeup in wait([self._wakeup, *living], timeout=timeout_s):
            os.eventfd_read(self._wakeup)
        self.turned_at = time.monotonic()
        if self.turned_at - before > _TICK_S + _LATE_S:
            self._ignore_silence_before = self.turned_at

    def _check(self, slot: Slot, now: float) -> None:
        if self._stop_by is not None:
            self._retire(slot, self._stop_by.at)
        if slot.process is None:
            if slot.is_retired:
                slot.fleet.slots.remove(slot)
            elif now >= slot.restart_at and self._may_start(slot):
                self._start(slot)
            return
        if slot.exit_reason:
            self._note_gone(slot)
            return
        if slot.process.is_alive():
            if now >= slot.abandon_at:
                self._abandon(slot)
            else:
                self._watch(slot, now)
            return
        self._note_exit(slot)
        self._note_gone(slot)

    def _may_start(self, slot: Slot) -> bool:
        """New workers wait for those that were turned away for them: each reload would add a model being loaded, to memory and cores."""
        fleet = slot.fleet
        is_incoming = fleet is self._incoming.get(fleet.name)
        if is_incoming and any(gone.name == fleet.name and gone.is_loading for gone in self._outgoing):
            return False
        return fleet.may_start(slot)

    def _start(self, slot: Slot) -> None:
        fleet = slot.fleet
        key = (fleet.name, slot.index)
        incarnation = self._incarnations.get(key, 0)
        self._incarnations[key] = incarnation + 1
        try:
            link, process = self._spawn(fleet, slot.index, incarnation)
        except OSError as error:  # no descriptors, no memory, no process ids: a time to wait, whatever the cause
            slot.deaths += 1
            slot.restart_at = time.monotonic() + slot.delay_s()
            log.warning("worker cannot be started", extra=fields(model=fleet.name, index=slot.index, why=str(error)))
            return
        slot.fill(process, link, time.monotonic())
        processes.prefer_for_oom(slot.pid)
        self._dispatcher.attach(link, fleet.settings)
        log.info("worker started", extra=fields(worker=link.name, pid=slot.pid))

    def _spawn(self, fleet: Fleet, index: int, incarnation: int) -> tuple[Link, SpawnProcess]:
        link, end = open_link(self._context, fleet.name, index, incarnation)
        process = self._context.Process(
            target=processes.run_worker,
            args=(self._worker_main, os.getpid(), end, fleet.profile, fleet.model, fleet.settings),
            name=link.name,
            daemon=True,
        )
        try:
            resource_tracker.ensure_running()  # were it gone, `start` would make it anew, and leave signals unblocked here
            # Inherited: there is no moment when a Ctrl-C hits the child.
            signal.pthread_sigmask(signal.SIG_BLOCK, processes.MASKED)
            process.start()
        except OSError:
            link.close()
            raise
        finally:
            end.close()
        return link, process

    # --- the living ---------------------------------------------------------------------------------------------------

    def _watch(self, slot: Slot, now: float) -> None:
        link, fleet = slot.link, slot.fleet
        if link is None:
            return
        if link.ready is not None and not slot.ready_at and not slot.is_retired and not slot.is_killed:
            self._note_ready(slot, now)
        if link.lost and slot.end_by == float("inf"):
            slot.end_by = now if link.is_broken else now + fleet.settings.terminate_timeout_s
            slot.kill_reason = link.lost if link.is_broken else ""
        # What the dispatcher has not read is no silence.
        silence_s = self._dispatcher.polled_at - max(link.beat_at, self._ignore_silence_before)
        resident = processes.resident_bytes(slot.pid)
        if now >= slot.end_by:
            self._kill(slot, slot.kill_reason or "it did not end within its grace")
        elif fault := slot.fault(link, silence_s, resident, self._memory_limit):
            self._kill(slot, fault)

    def _note_ready(self, slot: Slot, now: float) -> None:
        fleet, link = slot.fleet, slot.link
        if link is None or link.ready is None:
            return
        fleet.note_ready(slot, link, now)
        self._dispatcher.clear_failure(fleet.name)
        took_s = round(now - slot.started_at, 2)
        found = link.ready
        log.info(
            "worker ready",
            extra=fields(worker=link.name, seconds=took_s, engine=found.engine, why=found.why, capacity=found.capacity),
        )

    def _kill(self, slot: Slot, reason: str) -> None:
        if slot.process is None or slot.link is None or slot.is_killed:
            return
        slot.is_killed, slot.kill_reason = True, reason
        self._dispatcher.retire(slot.link)  # no job from now on, though it may take long to go
        slot.process.kill()
        slot.abandon_at = time.monotonic() + slot.fleet.settings.terminate_timeout_s
        log.warning("worker killed", extra=fields(worker=slot.process.name, pid=slot.pid, why=reason))

    def _retire(self, slot: Slot, end_by: float) -> None:
        """No more jobs, an orderly end, SIGKILL at `end_by`. One that is still loading hears no message: it gets less time."""
        if slot.is_retired:
            slot.end_by = min(slot.end_by, end_by)
            return
        slot.is_retired = True
        if slot.link is None:
            return
        if not slot.ready_at:
            end_by = min(end_by, time.monotonic() + slot.fleet.settings.terminate_timeout_s)
        slot.end_by = min(slot.end_by, end_by)
        self._dispatcher.retire(slot.link)

    # --- the dead -----------------------------------------------------------------------------------------------------

    def _abandon(self, slot: Slot) -> None:
        """Go on without a process that SIGKILL does not end: its jobs, and its slot, would wait for a driver that may never return."""
        if slot.link is None:
            return
        slot.exit_reason = f"{slot.kill_reason}; SIGKILL does not end it"
        log.error("worker does not end, and is done without", extra=fields(worker=slot.link.name, pid=slot.pid))
        self._dispatcher.detach(slot.link, slot.exit_reason)

    def _reap_unkillable(self) -> None:
        for process, fleet in [each for each in self._unkillable if not each[0].is_alive()]:
            self._unkillable.remove((process, fleet))
            fleet.unkillable -= 1
            log.info("worker ended at last", extra=fields(worker=process.name, pid=process.pid))
            process.close()

    def _note_exit(self, slot: Slot) -> None:
        """Reap the process, and have the dispatcher read its last words before anything is concluded from its death."""
        if slot.process is None or slot.link is None:
            return
        reason = processes.explain_exit(slot.process.exitcode)
        slot.exit_reason = slot.kill_reason or reason
        self._dispatcher.detach(slot.link, slot.exit_reason)

    def _note_gone(self, slot: Slot) -> None:
        process, link, fleet = slot.process, slot.link, slot.fleet
        if process is None or link is None or not link.lost:
            return
        now, reason = time.monotonic(), load_failure(link) or slot.exit_reason
        if process.is_alive():
            self._unkillable.append((process, fleet))
            fleet.unkillable += 1
        else:
            process.close()
        if slot.is_retired:
            slot.empty()
            log.info("worker ended", extra=fields(worker=link.name, why=slot.exit_reason))
            return
        failed_before = fleet.failure
        fleet.note_death(slot, link, reason, now)
        self._restarts[fleet.name] += 1
        delay_s = slot.delay_s()
        slot.restart_at = now + delay_s
        log.warning(
            "worker died",
            extra=fields(worker=link.name, pid=slot.pid, why=reason, deaths=fleet.deaths, restart_s=round(delay_s, 2)),
        )
        if fleet.failure != failed_before:
            log.error("model failed", extra=fields(model=fleet.name, why=fleet.failure))
            successor = self._incoming.get(fleet.name)
            is_alone = successor is None or not successor.ready_slots
            if self._fleets.get(fleet.name, fleet) is fleet and is_alone:  # the one that serves, or one that is leaving
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
        self._announce(settings)  # again: a removal of the same name may have come in between
        for fleet in [fleet for fleet in self._leaving if fleet.name in names]:
            self._leaving.remove(fleet)
            self._dismiss(fleet)  # what comes from here on is meant for the new workers, and what waits waits for them
        for name in [name for name in self._fleets if name not in names]:
            self._dispatcher.remove_model(name)
            self._leaving.append(self._fleets.pop(name))
        for name, fleet in make_fleets(settings, profiles).items():
            (self._incoming if name in self._fleets else self._fleets)[name] = fleet

    def _change_over(self) -> None:
        """Let ready new workers take the slots of old ones, and let go of fleets that are done."""
        for name, fleet in list(self._incoming.items()):
            # Half a fleet that works is better than an old one of which nothing does.
            is_needed = fleet.ready_slots and not self._fleets[name].ready_slots
            if failure := fleet.failure or ("" if is_needed else fleet.crash_loop_reason):
                log.error("reload failed, the old workers stay", extra=fields(model=name, why=failure))
                self._abort_incoming(fleet)
                continue
            old, ready = self._fleets[name], len(fleet.ready_slots)
            staying = sorted(old.staying_slots, key=lambda slot: slot.is_ready)  # those go first that do not work
            to_stay = 0 if ready == fleet.model.replicas else max(0, old.model.replicas - ready)
            for slot in staying[: max(0, len(staying) - to_stay)]:
                self._retire(slot, self._longest_end())
            if not to_stay:
                self._take_over(fleet)
        for fleet in list(self._leaving):
            if fleet.failure or self._unfinished(fleet.name) == 0:
                self._leaving.remove(fleet)
                self._dismiss(fleet)
                self._dispatcher.remove_model(fleet.name)  # again: without a worker left, nobody else may forget it
        self._outgoing = [fleet for fleet in self._outgoing if fleet.slots]

    def _take_over(self, fleet: Fleet) -> None:
        """No old worker gets a job any more: from here on requests are meant for the new ones."""
        name = fleet.name
        del self._incoming[name]
        self._dismiss(self._fleets[name])
        self._fleets[name] = fleet
        self._dispatcher.add_model(name, fleet.model.queue_limit)
        if self._on_serving:
            self._on_serving(fleet.profile, fleet.model)
        log.info("new workers have taken over", extra=fields(model=name))

    def _abort_incoming(self, fleet: Fleet) -> None:
        """New workers have failed, or were overtaken by yet newer ones: the old fleet is whole again."""
        del self._incoming[fleet.name]
        self._dismiss(fleet)
        old = self._fleets[fleet.name]
        old.restore()
        if old.failure and not old.ready_slots:
            self._dispatcher.fail_model(old.name, old.failure)

    def _dismiss(self, fleet: Fleet) -> None:
        for slot in fleet.slots:
            self._retire(slot, self._longest_end())
        self._outgoing.append(fleet)

    def _longest_end(self) -> float:
        """When a worker that drains for a reload must have ended: no job lives longer than the longest deadline."""
        return time.monotonic() + self._longest_job_s + self._settings.terminate_timeout_s

    def _unfinished(self, model: str) -> int:
        """Jobs that wait, and those that run: one whose worker dies needs another."""
        try:
            status = self._dispatcher.status(model)
            return status.queued + status.running
        except ModelNotFound:
            return 0

    def _is_stopped(self, now: float) -> bool:
        living = [slot for fleet in self._all_fleets() for slot in fleet.slots if slot.process]
        if not living:
            return True
        if self._stop_by and now > self._stop_by.at + self._settings.terminate_timeout_s:
            for slot in living:  # SIGKILL was sent; a driver holds it in an uninterruptible call
                log.error("worker does not end", extra=fields(worker=slot.link and slot.link.name, pid=slot.pid))
            return True
        return False
