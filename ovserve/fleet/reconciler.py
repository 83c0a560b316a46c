"""The reconciler: starts or retires fleets until they agree with the desired models.

    desired record                      fleets of the model
    none                                serving fleet finishes its jobs, then retires; the model is removed
    same worker key as the serving one  the serving fleet adopts it in place; no process changes
    another worker key                  an incoming fleet starts beside the serving one and takes over when ready; if
                                        there is no memory for both, the serving one ends first and requests wait
    another one, whose workers fail     the serving fleet stays; not tried again until the next `set_desired`

A worker that has finished `max_jobs_per_worker` jobs, or whose node is being drained, is worn: its fleet gets one more
slot, and when the worker in that is ready, the worn one is retired.

Runs in: the supervisor thread. No process is touched here: the supervisor starts the slots that are created, and ends
those that are retired.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.errors import ModelNotFound
from ovserve.fleet.desired import DesiredModel
from ovserve.fleet.fleets import Fleet, Slot
from ovserve.logs import fields

__all__ = ["ModelFleets", "Outcome", "Reconciler"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of the newest record of one model.

    Attributes:
        state: `loading`, `done` (its workers have been ready) or `failed`.
        reason: why it failed, or "".
    """

    state: str
    reason: str = ""


_LOADING, _DONE = Outcome("loading"), Outcome("done")


@dataclass(slots=True, eq=False)
class ModelFleets:
    """The fleets of one model.

    Attributes:
        serving: requests are checked by its settings.
        incoming: was started for a newer record; takes over when it is ready.
        retiring: fleets whose slots are all retired and whose workers finish their jobs.
        rejected: a record whose workers have failed.
        rejection: why they have failed.
        is_in_place: the incoming fleet starts when the workers of the serving one have exited.
        is_removed: the model is no longer desired, and admits no jobs.
    """

    serving: Fleet
    incoming: Fleet | None = None
    retiring: list[Fleet] = field(default_factory=list)
    rejected: DesiredModel | None = None
    rejection: str = ""
    is_in_place: bool = False
    is_removed: bool = False

    def __iter__(self) -> Iterator[Fleet]:
        yield self.serving
        if self.incoming is not None:
            yield self.incoming
        yield from self.retiring


class Reconciler:
    """Makes the fleets agree with the desired models.

    Args:
        dispatcher: gets models, limits and failures.
        retire: gives a slot's worker no more jobs, and ends it when it has finished those it has.
        on_serving: called when a record begins to serve, other than a model's first.

    Attributes:
        models: the fleets by model name, removed models included until their workers have exited.
        has_room: whether there is memory for this many more workers of a record.
        outcomes: what has become of each desired record since the last `set_desired`. Replaced as a whole, so that
            other threads may read it.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        retire: Callable[[Slot], None],
        on_serving: Callable[[DesiredModel], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._retire = retire
        self._on_serving = on_serving
        self.has_room: Callable[[DesiredModel, int], bool] = lambda _record, _count: True
        self._desired: dict[str, DesiredModel] = {}
        self.models: dict[str, ModelFleets] = {}
        self.outcomes: Mapping[str, Outcome] = {}

    def fleets(self) -> list[Fleet]:
        """Return every fleet that has or may have workers."""
        return [fleet for entry in list(self.models.values()) for fleet in entry]

    def workers(self) -> dict[str, int]:
        """Return how many workers each desired model should have."""
        return {name: record.workers for name, record in self._desired.items()}

    def record(self, name: str) -> DesiredModel:
        """Return the desired record of a model. Raises KeyError."""
        return self._desired[name]

    def records(self) -> list[DesiredModel]:
        """Return every desired record."""
        return list(self._desired.values())

    @property
    def is_settled(self) -> bool:
        """Whether every model is served as desired, or as well as possible, and no worker is being retired."""
        return not any(entry.incoming or entry.retiring or entry.is_removed for entry in list(self.models.values()))

    def may_start(self, slot: Slot) -> bool:
        """Return whether a slot's worker may be started now.

        Not while workers that an earlier change has retired are still loading: otherwise each change in a row would add
        another model that loads at the same time, and takes memory and cores.
        """
        fleet = slot.fleet
        entry = self.models.get(fleet.name)
        if entry is not None and fleet is entry.incoming and any(old.is_loading for old in entry.retiring):
            return False
        return fleet.may_start(slot)

    def set_desired(self, desired: Mapping[str, DesiredModel]) -> None:
        """Replace the desired state. Records that were rejected before are tried again.

        The numbers of workers are kept until the next `set_workers`.
        """
        workers = {name: record.workers for name, record in self._desired.items()}
        self._desired = desired = {
            name: dataclasses.replace(record, workers=workers.get(name, 0)) for name, record in desired.items()
        }
        self.outcomes = dict.fromkeys(desired, _LOADING)
        for name, record in desired.items():
            entry = self.models.get(name)
            if entry is None:
                self._add_to_dispatcher(record)
                self.models[name] = ModelFleets(Fleet(record))
                continue
            entry.rejected = None
            if entry.is_removed:
                entry.is_removed = False
                self._add_to_dispatcher(record)
                if entry.serving.desired.worker_key != record.worker_key:
                    # Queued jobs and later requests are for the new workers.
                    self._retire_fleet(entry, entry.serving)
                    entry.serving = Fleet(record)
        for name, entry in self.models.items():
            if name not in desired and not entry.is_removed:
                entry.is_removed = True
                self._dispatcher.remove_model(name)

    def set_workers(self, workers: Mapping[str, int], expected_load_s: Mapping[str, float]) -> None:
        """Change how many workers the models should have.

        Args:
            workers: the number of workers by model name.
            expected_load_s: how long a model is expected to load, where it is known.
        """
        for name, record in list(self._desired.items()):
            count = workers.get(name, 0)
            if count == record.workers:
                continue
            changed = self._desired[name] = dataclasses.replace(record, workers=count)
            entry = self.models.get(name)
            if entry is not None and entry.rejected is record:
                entry.rejected = changed  # the same configuration: it is not tried again
            self._dispatcher.set_wanted(name, count, expected_load_s.get(name, 0.0))
            # Loading is logged when the worker is ready; at a start, the configuration may still be refused.
            level = logging.DEBUG if count else logging.INFO
            log.log(level, "loading model" if count else "unloading model", extra=fields(model=name, workers=count))

    def reconcile(self) -> None:
        """Take the next steps towards the desired state."""
        for name, entry in list(self.models.items()):
            record = self._desired.get(name)
            if record is None:
                self._unload(entry)
            elif record.worker_key == entry.serving.desired.worker_key:
                self._adopt(entry, record)
            else:
                self._replace(entry, record)
            entry.retiring = [fleet for fleet in entry.retiring if fleet.slots]
            if entry.is_removed and not entry.retiring and not entry.serving.slots:
                del self.models[name]
        self.outcomes = {name: self._outcome(name) for name in self._desired}

    def forget_failure(self, name: str) -> bool:
        """Try a model that has failed again at once, as far as it should have workers; return whether it had failed."""
        entry = self.models.get(name)
        if entry is None or not entry.serving.failure:
            return False
        entry.serving.failure = ""
        for slot in entry.serving.slots:
            slot.restart_at = 0.0
        return True

    def note_failure(self, fleet: Fleet) -> None:
        """Fail the model of a fleet that has failed, unless another fleet serves it or will."""
        entry = self.models.get(fleet.name)
        if entry is None or fleet is not entry.serving:
            return
        if entry.incoming is None or not entry.incoming.ready_slots:
            self._dispatcher.fail_model(fleet.name, fleet.failure)

    # --- one model ----------------------------------------------------------------------------------------------------

    def _outcome(self, name: str) -> Outcome:
        """Return what has become of a model's newest record. A death after that does not change `done`."""
        record, entry = self._desired[name], self.models[name]
        serving = entry.serving
        if self.outcomes.get(name) == _DONE:
            return _DONE
        if entry.rejected is record:
            return Outcome("failed", entry.rejection)
        if entry.incoming is not None or serving.desired is not record:
            return _LOADING
        if len(serving.ready_slots) >= record.workers:
            return _DONE
        failure = serving.failure or serving.crash_loop_reason
        return Outcome("failed", failure) if failure else _LOADING

    def _unload(self, entry: ModelFleets) -> None:
        """Retire the workers of a removed model when its last job has ended."""
        if entry.incoming is not None:
            self._retire_fleet(entry, entry.incoming)
            entry.incoming = None
        if entry.serving.active_slots and (entry.serving.failure or self._unfinished_jobs(entry.serving.name) == 0):
            for slot in entry.serving.slots:
                self._retire(slot)
            self._dispatcher.remove_model(entry.serving.name)  # again: without workers, no other event removes it

    def _adopt(self, entry: ModelFleets, record: DesiredModel) -> None:
        """Serve a record with the workers that serve already, with as many of them as it asks for."""
        if entry.incoming is not None:
            self._abort_incoming(entry)
        fleet = entry.serving
        if fleet.desired is not record:
            is_same = (fleet.desired.model, fleet.desired.profile) == (record.model, record.profile)
            fleet.adopt(record)
            self._add_to_dispatcher(record)
            if not is_same:
                self._on_serving(record)
        count = record.workers
        if fleet.needs_successor(count) and (len(fleet.active_slots) > count or self.has_room(record, 1)):
            count += 1
        for slot in fleet.surplus_slots(count):
            if slot.is_worn and slot.link is not None:
                jobs = slot.link.state.jobs_done
                log.info("worker is replaced by a fresh one", extra=fields(worker=slot.link.name, jobs=jobs))
            self._retire(slot)
        fleet.fill_slots(count)

    def _replace(self, entry: ModelFleets, record: DesiredModel) -> None:
        """Start workers for a record that the serving ones cannot adopt; hand over one by one as they become ready."""
        if entry.incoming is not None and entry.incoming.desired.worker_key != record.worker_key:
            self._abort_incoming(entry)
        if record is entry.rejected:
            self._keep_serving(entry, record.workers)
            return
        count = record.workers
        if entry.incoming is None:
            entry.incoming = Fleet(record)
            entry.is_in_place = bool(entry.serving.slots) and not self.has_room(record, count)
            if entry.is_in_place:
                log.info("no memory for new workers beside the old ones", extra=fields(model=record.name))
        old, new = entry.serving, entry.incoming
        if new.desired is not record:
            new.adopt(record)
        for slot in new.surplus_slots(count):
            self._retire(slot)
        if entry.is_in_place:
            for slot in old.slots:
                self._retire(slot)
        if not (entry.is_in_place and old.slots):
            new.fill_slots(count)
        ready = len(new.ready_slots)
        # New workers of which some are ready are better than old ones of which none is.
        is_needed = ready and not old.ready_slots
        if failure := new.failure or ("" if is_needed else new.crash_loop_reason):
            log.error("reload failed, the old workers stay", extra=fields(model=old.name, why=failure))
            entry.rejected, entry.rejection = record, failure
            self._abort_incoming(entry)
            return
        keep = 0 if ready >= count else max(0, max(old.model.fewest_workers, old.desired.workers) - ready)
        if entry.is_in_place and not ready and count:
            return  # the old workers have been retired, and the new ones load
        for slot in old.surplus_slots(keep):
            self._retire(slot)
        if not keep or entry.is_in_place:
            self._take_over(entry)

    def _take_over(self, entry: ModelFleets) -> None:
        """Make the incoming fleet the serving one. All old workers are retired, so new jobs go to the new ones."""
        if entry.incoming is None:
            return
        self._retire_fleet(entry, entry.serving)
        entry.serving, entry.incoming = entry.incoming, None
        record = entry.serving.desired
        self._add_to_dispatcher(record)
        self._on_serving(record)
        log.info("new workers have taken over", extra=fields(model=record.name))

    def _abort_incoming(self, entry: ModelFleets) -> None:
        """Retire an incoming fleet that failed or is no longer desired; the serving fleet gets its slots back."""
        if entry.incoming is None:
            return
        self._retire_fleet(entry, entry.incoming)
        entry.incoming = None
        serving = entry.serving
        self._keep_serving(entry, self._desired[serving.name].workers if serving.name in self._desired else 0)
        if serving.failure and not serving.ready_slots:
            self._dispatcher.fail_model(serving.name, serving.failure)

    def _retire_fleet(self, entry: ModelFleets, fleet: Fleet) -> None:
        for slot in fleet.slots:
            self._retire(slot)
        entry.retiring.append(fleet)

    def _add_to_dispatcher(self, record: DesiredModel) -> None:
        self._dispatcher.add_model(
            record.name, record.model.queue_limit, record.settings, is_on_demand=record.model.is_lazy
        )

    def _keep_serving(self, entry: ModelFleets, workers: int) -> None:
        """Give the serving fleet its own number of workers, or none while the model is not resident."""
        serving = entry.serving
        count = max(serving.model.fewest_workers, min(workers, serving.model.most_workers)) if workers else 0
        for slot in serving.surplus_slots(count):
            self._retire(slot)
        serving.fill_slots(count)

    def _unfinished_jobs(self, model: str) -> int:
        """Return how many jobs are queued or running; a running job is requeued if its worker dies."""
        try:
            status = self._dispatcher.status(model)
        except ModelNotFound:
            return 0
        return status.queued + status.running
