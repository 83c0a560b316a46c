from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import select
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, JobEvent, Partial, Result, State
from ovserve.errors import (
    ContentTooLarge,
    DeadlineExceeded,
    Draining,
    ImageError,
    InternalError,
    LinkClosed,
    ModelFailed,
    ModelNotFound,
    NotReady,
    QueueFull,
    SpoolFull,
    SpoolUnusable,
    WorkerCrashed,
)
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.blobs import Blob
from ovserve.wire.local.pipes import open_link
from ovserve.wire.local.spool import Spool, fill
from ovserve.wire.messages import (
    Cancel,
    Done,
    Failed,
    Grant,
    Heartbeat,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Stop,
)
from ovserve.wire.request import ImageRequest

CONTEXT = multiprocessing.get_context("spawn")
PATIENCE_S = 10.0  # a wait that runs into this is a failure
QUIET_S = 0.05  # within this, what is not to happen would have happened

M = TypeVar("M", bound=Message)


class FakeWorker:
    """The worker's end of a link inside the test, which plays the worker itself."""

    def __init__(self, model: str = "toy", index: int = 0, reads: bool = True) -> None:
        self.link, self.end = open_link(CONTEXT, model, index, 0)
        self.heard: queue.Queue[Message | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        if reads:
            self.reader.start()

    def _read(self) -> None:
        try:
            while True:
                self.heard.put(self.end.receive())
        except LinkClosed:
            self.heard.put(None)

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.end.send(message)

    def expect(self, kind: type[M]) -> M:
        message = self.heard.get(timeout=PATIENCE_S)
        assert isinstance(message, kind), message
        return message

    def expect_silence(self) -> None:
        with pytest.raises(queue.Empty):
            assert self.heard.get(timeout=QUIET_S) is None

    def expect_closed(self) -> None:
        while (message := self.heard.get(timeout=PATIENCE_S)) is not None:
            assert isinstance(message, Message)

    def deliver(self, job: str, picture: int = 0, data: bytes = b"picture", partial: int = -1) -> None:
        self.say(Prepared(job, "image2image", 8, 8, 1, 1, 1, 1), Need(job, picture, len(data), partial))
        room = self.expect(Grant)
        fill(room.path, data)
        self.say(Picture(job, picture, 40 + picture, len(data), partial))

    def serve(self) -> str:
        """Do one job of one picture; its id."""
        run = self.expect(Run)
        self.deliver(run.job)
        self.say(Done(run.job, 1, 2, 3))
        return run.job

    def die(self) -> None:
        """What the kernel does to the descriptors of a killed process."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), self.end.commands.fileno())
        self.end.reports.close()

    def close(self) -> None:
        self.link.close()
        if self.reader.ident:
            self.reader.join(PATIENCE_S)
        self.end.commands.close()
        if not self.end.reports.closed:
            self.end.reports.close()


class House:
    """A dispatcher with its spool, its fake workers and its jobs."""

    def __init__(self, directory: Path, **options: object) -> None:
        model = ModelSettings(name="toy", max_resolution=Resolution(512, 512))
        self.settings = Settings(models=(model,), **options)  # type: ignore[arg-type]
        self.spool = Spool(directory, 16 << 20)
        self.changes = threading.Event()
        self.dispatcher = Dispatcher(self.spool, self.settings, on_change=self.changes.set)
        self.dispatcher.add_model("toy", 4)
        self.workers: list[FakeWorker] = []
        self.jobs: list[Job] = []
        self._ids = itertools.count()

    def worker(self, capacity: int = 1, model: str = "toy", ready: bool = True, reads: bool = True) -> FakeWorker:
        worker = FakeWorker(model, len(self.workers), reads)
        self.workers.append(worker)
        self.dispatcher.attach(worker.link)
        if ready:
            worker.say(Ready(capacity, "fake"))
            # Not by counting: a worker that has just died may still be among the known ones.
            self.until(lambda: worker.link.ready is not None)
        return worker

    def job(
        self, client: str = "c", timeout_s: float = 60.0, model: str = "toy", n: int = 1, partial_images: int = 0
    ) -> Job:
        request = ImageRequest(task="edit", prompt="x", n=n, partial_images=partial_images, progress=True)
        job = Job(f"job-{next(self._ids)}", model, Client(client), request, Deadline.after(timeout_s))
        self.jobs.append(job)
        return job

    def admit(self, **known: object) -> Job:
        job = self.job(**known)  # type: ignore[arg-type]
        self.dispatcher.admit(job)
        return job

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = Deadline.after(PATIENCE_S)
        while not is_so():
            assert not deadline.is_expired()
            self.changes.wait(0.01)
            self.changes.clear()

    def settled(self, job: Job) -> State:
        events(job, until_settled=True)
        return job.state

    def close(self) -> None:
        self.dispatcher.close()
        for job in self.jobs:
            job.close()
        for worker in self.workers:
            worker.close()
        assert self.spool.used_bytes == 0
        self.spool.close()


def events(job: Job, until_settled: bool = False) -> list[object]:
    """What the job's handler is told, waiting as a handler does."""
    found: list[object] = []
    deadline = Deadline.after(PATIENCE_S)
    while not found or until_settled:
        if until_settled and job.is_settled:
            break
        assert select.select([job.wakeup], [], [], deadline.remaining())[0], "the handler was not woken"
        found += job.take_events()
        if job.is_settled and not until_settled:
            break
    return found + job.take_events()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, hang_limit_s=1.0)
    yield made
    made.close()


# --- a job's way -------------------------------------------------------------------------------------------------------


def test_job_is_run_and_its_pictures_come_back(house: House) -> None:
    worker = house.worker()
    job = house.admit(n=2, timeout_s=30.0)
    run = worker.expect(Run)
    assert run.job == job.id
    assert 25 < run.timeout_s <= 30
    assert not run.alone
    assert ImageRequest.from_json(Path(run.request).read_bytes()) == job.request
    for picture in range(2):
        worker.deliver(job.id, picture, f"picture {picture}".encode())
    worker.say(Done(job.id, 1.5, 2.5, 3.5))
    assert house.settled(job) is State.DONE
    shown = {k: (bytes(r.segment.view[: r.size]), r.seed) for k, r in job.results.items()}
    assert shown == {0: (b"picture 0", 40), 1: (b"picture 1", 41)}
    assert (job.timings.prepare_ms, job.timings.denoise_ms, job.timings.finish_ms) == (1.5, 2.5, 3.5)
    assert job.timings.admitted_at <= job.timings.dispatched_at <= job.timings.settled_at
    assert house.dispatcher.in_flight() == 0
    assert worker.link.jobs_done == 1


def test_handler_is_told_what_happens(house: House) -> None:
    worker = house.worker()
    job = house.admit(partial_images=1)
    worker.expect(Run)
    prepared = Prepared(job.id, "image2image", 8, 8, 4, 1, 1, 1)
    worker.say(prepared)
    assert events(job) == [prepared]
    worker.say(Progress(job.id, 0, 1, 4))
    assert events(job) == [Progress(job.id, 0, 1, 4)]
    worker.deliver(job.id, data=b"preview", partial=0)
    [partial] = events(job)
    assert isinstance(partial, Partial)
    assert bytes(partial.segment.view[: partial.size]) == b"preview"
    worker.deliver(job.id, data=b"whole")
    [result] = events(job)
    assert isinstance(result, Result)
    assert result.picture == 0
    worker.say(Done(job.id, 0, 0, 0))
    assert house.settled(job) is State.DONE


def test_error_of_a_worker_becomes_the_jobs_error(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.say(Failed(job.id, ImageError("not an image", param="image").to_wire()))
    assert house.settled(job) is State.FAILED
    assert isinstance(job.error, ImageError)
    assert job.error.param == "image"


def test_deadline_noticed_by_the_worker_counts_as_expired(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.say(Failed(job.id, DeadlineExceeded("late").to_wire()))
    assert house.settled(job) is State.EXPIRED


# --- who gets the next job ----------------------------------------------------------------------------------------------


def test_worker_is_filled_to_its_capacity_and_not_beyond(house: House) -> None:
    worker = house.worker(capacity=2)
    jobs = [house.admit() for _ in range(3)]
    assert [worker.expect(Run).job for _ in range(2)] == [jobs[0].id, jobs[1].id]
    worker.expect_silence()
    assert house.dispatcher.status("toy").queued == 1
    worker.deliver(jobs[1].id)
    worker.say(Done(jobs[1].id, 0, 0, 0))
    assert worker.expect(Run).job == jobs[2].id


def test_least_loaded_worker_is_filled_first(house: House) -> None:
    first, second = house.worker(capacity=3), house.worker(capacity=3)
    for _ in range(4):
        house.admit()
    for worker in (first, second):
        worker.expect(Run)
        worker.expect(Run)
        worker.expect_silence()


def test_among_equals_the_worker_heard_of_last_is_taken(house: House) -> None:
    first, second = house.worker(), house.worker()
    heard_at = first.link.beat_at
    first.say(Heartbeat("idle"))
    house.until(lambda: first.link.beat_at > heard_at)
    house.admit()
    first.expect(Run)
    second.expect_silence()


def test_clients_take_turns(house: House) -> None:
    house.dispatcher.add_model("toy", 100)
    worker = house.worker()
    running = house.admit(client="greedy")
    worker.expect(Run)
    greedy = [house.admit(client="greedy") for _ in range(4)]
    modest = house.admit(client="modest")
    worker.deliver(running.id)
    worker.say(Done(running.id, 0, 0, 0))
    assert [worker.serve() for _ in range(5)] == [job.id for job in (greedy[0], modest, *greedy[1:])]


def test_client_with_pictures_enough_on_a_worker_leaves_its_other_places_to_others(house: House) -> None:
    house.dispatcher.add_model("toy", 100)
    worker = house.worker(capacity=3)
    greedy = [house.admit(client="greedy", n=n) for n in (1, 4, 4)]
    assert [worker.expect(Run).job for _ in range(2)] == [greedy[0].id, greedy[1].id]
    worker.expect_silence()  # five of its pictures: enough to keep a worker for three busy
    modest = house.admit(client="modest")
    assert worker.expect(Run).job == modest.id
    worker.deliver(modest.id)
    worker.say(Done(modest.id, 0, 0, 0))
    worker.deliver(greedy[0].id)
    worker.say(Done(greedy[0].id, 0, 0, 0))
    for picture in range(2):
        worker.expect_silence()
        worker.deliver(greedy[1].id, picture)
    house.dispatcher.admit(house.job(client="another"))  # a turn of the dispatcher, as any report brings one
    assert {worker.expect(Run).job for _ in range(2)} == {greedy[2].id, house.jobs[-1].id}


def test_lone_client_with_jobs_of_many_pictures_keeps_every_worker_busy(house: House) -> None:
    workers = [house.worker(capacity=3) for _ in range(2)]
    for _ in range(3):
        house.admit(n=10)
    for worker in workers:
        worker.expect(Run)
        worker.expect_silence()


def test_models_do_not_wait_for_one_another(house: House) -> None:
    house.dispatcher.add_model("other", 4)
    busy, free = house.worker(), house.worker(model="other")
    house.admit()
    busy.expect(Run)
    house.admit()
    assert house.admit(model="other").id == free.expect(Run).job


# --- admission ----------------------------------------------------------------------------------------------------------


def test_unknown_model_is_not_found(house: House) -> None:
    with pytest.raises(ModelNotFound):
        house.admit(model="nobody")
    with pytest.raises(ModelNotFound):
        house.dispatcher.status("nobody")


def test_model_that_has_not_worked_yet_is_not_ready(house: House) -> None:
    house.worker(ready=False)
    with pytest.raises(NotReady, match="loading"):
        house.admit()
    status = house.dispatcher.status("toy")
    assert (status.ready, status.reason, status.workers) == (False, "loading", 0)


def test_model_whose_worker_restarts_takes_jobs_and_keeps_them(house: House) -> None:
    house.worker().die()
    house.until(lambda: house.dispatcher.status("toy").reason == "restarting")
    job = house.admit()
    assert house.worker().serve() == job.id


def test_full_queue_refuses_with_a_time_that_comes_from_measured_jobs(house: House) -> None:
    worker = house.worker()
    slow = house.admit()
    worker.expect(Run)
    time.sleep(0.3)  # the job's measured time
    worker.deliver(slow.id)
    worker.say(Done(slow.id, 0, 0, 0))
    house.settled(slow)
    assert 0.3 <= house.dispatcher.status("toy").job_s < 0.6
    house.dispatcher.add_model("toy", 8)
    for number in range(9):
        house.admit(client=str(number))
    house.until(lambda: house.dispatcher.status("toy").queued == 8)
    with pytest.raises(QueueFull) as caught:
        house.admit()
    assert caught.value.retry_after_s in (2, 3, 4)  # eight jobs of 0.3 s one after another
    assert caught.value.should_retry
    assert house.dispatcher.in_flight() == 9


@pytest.mark.parametrize(("limit", "wait_s"), [(1, 1), (100, 60)])
def test_retry_after_stays_within_its_range(house: House, limit: int, wait_s: int) -> None:
    house.dispatcher.add_model("toy", limit)
    house.worker()
    for number in range(limit + 1):
        house.admit(client=str(number))
        house.until(lambda: house.dispatcher.status("toy").running == 1)
    with pytest.raises(QueueFull) as caught:
        house.admit()
    assert caught.value.retry_after_s == wait_s


def test_refused_job_leaves_nothing_behind(house: House) -> None:
    house.dispatcher.add_model("toy", 1)
    worker = house.worker()
    house.admit()
    worker.expect(Run)
    house.admit()
    used = house.spool.used_bytes
    refused = house.job()
    with pytest.raises(QueueFull):
        house.dispatcher.admit(refused)
    refused.close()
    assert house.spool.used_bytes == used
    assert house.dispatcher.in_flight() == 2


def test_one_client_leaves_places_for_others(house: House) -> None:
    house.dispatcher.add_model("toy", 27)
    house.worker().die()
    house.until(lambda: house.dispatcher.status("toy").workers == 0)
    for _ in range(22):
        house.admit(client="greedy")
    with pytest.raises(QueueFull):
        house.admit(client="greedy")
    house.admit(client="modest")


def test_no_room_for_the_request_is_spool_full(house: House) -> None:
    house.worker()
    hog = house.spool.create(16 << 20, reserve=16 << 20)
    with pytest.raises(SpoolFull):
        house.admit()
    hog.release()
    assert house.dispatcher.in_flight() == 0


def test_draining_takes_no_jobs_and_finishes_those_it_has(house: House) -> None:
    worker = house.worker()
    running, waiting = house.admit(), house.admit()
    house.dispatcher.drain()
    with pytest.raises(Draining) as caught:
        house.admit()
    assert caught.value.retry_after_s
    assert house.dispatcher.status("toy").reason == "draining"
    assert not house.dispatcher.wait_idle(Deadline.after(0))
    assert [worker.serve(), worker.serve()] == [running.id, waiting.id]
    assert house.dispatcher.wait_idle(Deadline.after(PATIENCE_S))


def test_failed_model_answers_its_queue_and_whoever_comes_with_the_reason(house: House) -> None:
    worker = house.worker()
    running, waiting = house.admit(), house.admit()
    worker.expect(Run)
    house.dispatcher.fail_model("toy", "no such device")
    assert house.settled(waiting) is State.FAILED
    assert isinstance(waiting.error, ModelFailed)
    with pytest.raises(ModelFailed, match="no such device"):
        house.admit()
    assert house.dispatcher.status("toy").failed
    assert not running.is_settled
    worker.die()
    assert house.settled(running) is State.FAILED
    assert isinstance(running.error, ModelFailed)
    house.dispatcher.clear_failure("toy")
    house.until(lambda: house.dispatcher.status("toy").workers == 0)
    job = house.admit()
    assert house.worker().serve() == job.id


def test_removed_model_finishes_its_queue_and_is_forgotten(house: House) -> None:
    worker = house.worker()
    jobs = [house.admit(), house.admit()]
    house.dispatcher.remove_model("toy")
    with pytest.raises(NotReady, match="unloaded"):
        house.admit()
    assert [worker.serve(), worker.serve()] == [job.id for job in jobs]
    house.dispatcher.retire(worker.link)
    worker.expect(Stop)
    worker.die()
    house.until(lambda: house.dispatcher.models() == [])


class RemovingJob(Job):
    """A job whose model is removed while its dead worker gives it back."""

    dispatcher: Dispatcher

    def drop_results(self) -> None:
        self.dispatcher.remove_model(self.model)
        Job.drop_results(self)


def test_model_removed_while_a_dead_worker_gives_its_job_back_keeps_the_job(house: House) -> None:
    doomed = house.worker()
    job = RemovingJob("removing", "toy", Client("c"), house.job().request, Deadline.after(60))
    job.dispatcher = house.dispatcher
    house.jobs.append(job)
    house.dispatcher.admit(job)
    doomed.expect(Run)
    doomed.die()
    house.until(lambda: bool(doomed.link.lost))
    assert house.dispatcher.models() == ["toy"]
    worker = house.worker()
    assert worker.serve() == job.id
    assert house.settled(job) is State.DONE
    worker.die()
    house.until(lambda: house.dispatcher.models() == [])


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_removed_model_without_workers_is_forgotten_with_its_last_job(house: House, is_cancelled: bool) -> None:
    house.worker().die()
    house.until(lambda: house.dispatcher.status("toy").workers == 0)
    job = house.admit(timeout_s=60.0 if is_cancelled else 0.2)
    house.dispatcher.remove_model("toy")
    assert house.dispatcher.models() == ["toy"]
    if is_cancelled:
        house.dispatcher.cancel(job)
    house.until(lambda: house.dispatcher.models() == [])
    assert job.state is (State.CANCELLED if is_cancelled else State.EXPIRED)


# --- deadlines and cancellation -----------------------------------------------------------------------------------------


def test_deadline_in_the_queue_costs_no_device_time(house: House) -> None:
    worker = house.worker()
    running = house.admit()
    late = house.admit(timeout_s=0.1)
    worker.expect(Run)
    assert house.settled(late) is State.EXPIRED
    assert isinstance(late.error, DeadlineExceeded)
    worker.deliver(running.id)
    worker.say(Done(running.id, 0, 0, 0))
    worker.expect_silence()


def test_deadline_on_the_device_stops_the_work_and_answers_at_once(house: House) -> None:
    worker = house.worker()
    late = house.admit(timeout_s=0.1)
    worker.expect(Run)
    assert house.settled(late) is State.EXPIRED
    assert worker.expect(Cancel).job == late.id
    next_job = house.admit()
    worker.expect_silence()
    worker.say(Failed(late.id, DeadlineExceeded("stopped").to_wire()))
    assert worker.expect(Run).job == next_job.id


def test_cancelled_in_the_queue_leaves_it_at_once(house: House) -> None:
    worker = house.worker()
    house.admit()
    waiting = house.admit()
    worker.expect(Run)
    house.until(lambda: house.dispatcher.status("toy").running == 1)
    assert house.dispatcher.cancel(waiting)
    assert waiting.state is State.CANCELLED
    assert house.dispatcher.status("toy").queued == 0
    worker.expect_silence()
    assert not house.dispatcher.cancel(waiting)


def test_cancelled_on_the_device_keeps_its_place_until_the_worker_lets_go(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    assert house.dispatcher.cancel(job)
    assert worker.expect(Cancel).job == job.id
    next_job = house.admit()
    worker.expect_silence()
    worker.say(Done(job.id, 0, 0, 0))
    assert worker.serve() == next_job.id
    assert job.state is State.CANCELLED


def test_cancelled_while_its_result_is_written(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.say(Need(job.id, 0, 7))
    room = worker.expect(Grant)
    house.dispatcher.cancel(job)
    job.close()
    with pytest.raises(FileNotFoundError):
        fill(room.path, b"picture")
    worker.say(Picture(job.id, 0, 1, 7), Done(job.id, 0, 0, 0))
    worker.expect(Cancel)
    assert house.admit().id == worker.expect(Run).job


def test_need_of_a_cancelled_job_gets_no_room(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    house.dispatcher.cancel(job)
    worker.expect(Cancel)
    worker.say(Need(job.id, 0, 7))
    assert worker.expect(Grant) == Grant(job.id, 0, "")


def test_job_whose_exchange_ended_before_admission_is_dropped(house: House) -> None:
    house.worker()
    job = house.job()
    job.close()
    house.dispatcher.admit(job)
    assert house.dispatcher.in_flight() == 0


@pytest.mark.parametrize("late", ["progress", "picture", "need", "prepared"])
def test_trailing_report_of_a_given_up_job_is_no_offence(house: House, late: str) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    house.dispatcher.cancel(job)
    worker.expect(Cancel)
    worker.say(Failed(job.id, {}))
    worker.say(
        {
            "progress": Progress(job.id, 0, 1, 2),
            "picture": Picture(job.id, 0, 1, 7),
            "need": Need(job.id, 0, 7),
            "prepared": Prepared(job.id, "x", 1, 1, 1, 1, 1, 1),
        }[late]
    )
    assert house.admit().id == worker.serve()


def test_worker_that_holds_on_to_cancelled_jobs_is_let_go_of(hasty: House) -> None:
    worker = hasty.worker()
    job = hasty.admit()
    worker.expect(Run)
    hasty.dispatcher.cancel(job)
    waiting = hasty.admit()
    hasty.until(lambda: bool(worker.link.lost))
    assert "cancelled" in worker.link.lost
    assert worker.link.is_broken
    assert hasty.worker().serve() == waiting.id


def test_worker_at_work_for_others_is_not_taken_for_stuck(hasty: House) -> None:
    worker = hasty.worker(capacity=2)
    cancelled, wanted = hasty.admit(), hasty.admit()
    worker.expect(Run)
    worker.expect(Run)
    hasty.dispatcher.cancel(cancelled)
    worker.expect(Cancel)
    turned_at = hasty.dispatcher.turned_at
    hasty.until(lambda: hasty.dispatcher.turned_at > turned_at + 2.1)  # looked at twice, both after the limit
    assert not worker.link.lost
    worker.deliver(wanted.id)


# --- the spool ----------------------------------------------------------------------------------------------------------


def test_no_room_for_the_result_is_spool_full_and_the_worker_is_told(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    hog = house.spool.create(16 << 20, reserve=(16 << 20) - house.spool.used_bytes - 3)
    worker.say(Need(job.id, 0, 7))
    assert worker.expect(Grant).path == ""
    assert house.settled(job) is State.FAILED
    assert isinstance(job.error, SpoolFull)
    worker.say(Failed(job.id, SpoolFull("no room").to_wire()))
    hog.release()
    assert house.admit().id == worker.serve()


def test_request_that_never_fits_beside_its_uploads_is_refused(house: House) -> None:
    house.worker()
    uploads = (Blob("one", 0, 9 << 20), Blob("two", 0, 4 << 20))
    request = ImageRequest(task="edit", prompt="x", images=uploads, mask=Blob("mask", 0, 3 << 20))
    job = Job("large", "toy", Client("c"), request, Deadline.after(60))
    house.jobs.append(job)
    with pytest.raises(ContentTooLarge):
        house.dispatcher.admit(job)


def test_results_that_never_fit_together_are_the_clients_to_change(house: House) -> None:
    worker = house.worker()
    job = house.admit(n=4)
    worker.expect(Run)
    worker.say(*(Need(job.id, picture, 5 << 20) for picture in range(4)))
    paths = [worker.expect(Grant).path for _ in range(4)]
    assert [bool(path) for path in paths] == [True, True, True, False]
    assert house.settled(job) is State.FAILED
    assert isinstance(job.error, ContentTooLarge)


def test_file_that_cannot_be_made_costs_its_own_job_only(house: House) -> None:
    worker = house.worker(capacity=2)
    job, other = house.admit(), house.admit()
    worker.expect(Run)
    worker.expect(Run)
    worker.deliver(other.id)
    shutil.rmtree(house.spool.directory)
    house.spool.directory.write_bytes(b"in the way")
    worker.say(Need(job.id, 0, 7), Done(other.id, 0, 0, 0))
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert house.settled(job) is State.FAILED
    assert isinstance(job.error, SpoolUnusable)
    assert house.settled(other) is State.DONE
    assert not worker.link.lost
    house.spool.directory.unlink()


def test_no_model_is_ready_while_the_spool_cannot_be_used(house: House) -> None:
    worker = house.worker()
    shutil.rmtree(house.spool.directory)
    house.spool.directory.write_bytes(b"in the way")
    with pytest.raises(SpoolUnusable):
        house.admit()
    status = house.dispatcher.status("toy")
    assert (status.ready, status.workers) == (False, 1)
    assert "cannot be used" in status.reason
    assert [status.ready for status in house.dispatcher.statuses()] == [False]
    house.spool.directory.unlink()
    assert house.dispatcher.status("toy").ready
    assert house.admit().id == worker.serve()


def test_result_larger_than_any_picture_fails_its_job_and_not_the_worker(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.say(Need(job.id, 0, 512 * 512 * 5 + (4 << 20)))
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert house.settled(job) is State.FAILED
    assert isinstance(job.error, InternalError)
    worker.say(Failed(job.id, SpoolFull("no room").to_wire()))
    assert house.admit().id == worker.serve()


def test_small_picture_with_the_longest_prompts_has_room(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.say(Need(job.id, 0, 512 * 512 * 4 + 2 * 2 * 2 * 256 * 1024))
    assert worker.expect(Grant).path


def test_preview_without_room_is_left_out_and_its_picture_is_made(house: House) -> None:
    worker = house.worker()
    job = house.admit(partial_images=1)
    worker.expect(Run)
    hog = house.spool.create(16 << 20, reserve=(16 << 20) - house.spool.used_bytes - 3)
    worker.say(Need(job.id, 0, 7, 0))
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert not job.is_settled
    hog.release()
    worker.deliver(job.id)
    worker.say(Done(job.id, 0, 0, 0))
    assert house.settled(job) is State.DONE


# --- death --------------------------------------------------------------------------------------------------------------


def test_job_of_a_dead_worker_runs_again_alone_and_first(house: House) -> None:
    first = house.worker()
    job, waiting = house.admit(), house.admit()
    first.expect(Run)
    first.deliver(job.id)
    first.die()
    house.until(lambda: bool(first.link.lost))
    second = house.worker(capacity=4)
    run = second.expect(Run)
    assert (run.job, run.alone) == (job.id, True)
    second.expect_silence()
    second.deliver(job.id, data=b"again")
    second.say(Done(job.id, 0, 0, 0))
    assert house.settled(job) is State.DONE
    assert job.attempts == 2
    assert bytes(job.results[0].segment.view[:5]) == b"again"
    run = second.expect(Run)
    assert (run.job, run.alone) == (waiting.id, False)


def test_each_picture_is_told_once_over_both_workers(house: House) -> None:
    first = house.worker()
    job = house.admit(partial_images=1)
    first.expect(Run)
    first.deliver(job.id, partial=0)
    first.deliver(job.id)
    assert len(events(job)) >= 1
    first.die()
    second = house.worker()
    second.expect(Run)
    job.take_events()
    second.deliver(job.id, partial=0)
    second.deliver(job.id)
    second.say(Done(job.id, 0, 0, 0))
    assert events(job, until_settled=True) == []
    assert set(job.results) == {0}


def test_second_death_is_the_end(house: House) -> None:
    job = None
    for number in range(2):
        worker = house.worker()
        job = job or house.admit()
        assert worker.expect(Run).alone == bool(number)
        worker.die()
        house.until(lambda worker=worker: bool(worker.link.lost))  # type: ignore[misc]
        assert (worker.link.jobs_lost, worker.link.lost_retried_job) == (1, bool(number))
    assert job is not None
    assert house.settled(job) is State.FAILED
    assert isinstance(job.error, WorkerCrashed)
    assert job.error.should_retry is False


def test_job_that_dead_workers_never_read_has_no_part_in_their_deaths(house: House) -> None:
    job = None
    for _ in range(3):
        doomed = house.worker(reads=False)
        job = job or house.admit()
        house.until(lambda: house.dispatcher.status("toy").running == 1)
        doomed.die()
        house.until(lambda doomed=doomed: bool(doomed.link.lost))  # type: ignore[misc]
        assert (doomed.link.jobs_lost, doomed.link.lost_retried_job) == (0, False)
    assert job
    last = house.worker()
    run = last.expect(Run)
    assert (run.job, run.alone) == (job.id, False)
    last.deliver(job.id)
    last.say(Done(job.id, 1, 2, 3))
    assert house.settled(job) is State.DONE


def test_job_that_its_dead_worker_never_read_goes_to_the_next_before_others_and_beside_them(house: House) -> None:
    doomed = house.worker(reads=False)
    unread = house.admit(client="a")
    house.until(lambda: house.dispatcher.status("toy").running == 1)
    later = house.admit(client="b")
    doomed.die()
    worker = house.worker(capacity=2)
    assert [worker.expect(Run).job for _ in range(2)] == [unread.id, later.id]


def test_batch_neighbours_of_a_poison_job_survive_it(house: House) -> None:
    first = house.worker(capacity=3)
    poison, *others = [house.admit() for _ in range(3)]
    for _ in range(3):
        first.expect(Run)
    first.die()
    second = house.worker(capacity=3)
    assert second.expect(Run).job == poison.id
    second.expect_silence()
    second.die()
    assert house.settled(poison) is State.FAILED
    third = house.worker(capacity=3)
    assert [third.serve(), third.serve()] == [job.id for job in others]
    assert [house.settled(job) for job in others] == [State.DONE, State.DONE]


def test_lone_job_waits_for_an_empty_worker_which_is_kept_free_for_it(house: House) -> None:
    doomed, busy = house.worker(capacity=1), house.worker(capacity=2)
    held = house.admit()  # to the one heard of last
    busy.expect(Run)
    lone = house.admit()
    doomed.expect(Run)
    doomed.die()
    house.until(lambda: bool(doomed.link.lost))
    waiting = house.admit()
    busy.expect_silence()
    busy.deliver(held.id)
    busy.say(Done(held.id, 0, 0, 0))
    assert [busy.serve(), busy.serve()] == [lone.id, waiting.id]


def test_last_words_of_a_dead_worker_count(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.deliver(job.id)
    worker.say(Done(job.id, 0, 0, 0))
    worker.die()
    house.dispatcher.detach(worker.link, "killed")
    assert house.settled(job) is State.DONE
    house.until(lambda: bool(worker.link.lost))
    assert worker.link.jobs_lost == 0


def test_detached_worker_that_hangs_gives_its_jobs_back(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    house.dispatcher.detach(worker.link, "hung")
    house.dispatcher.detach(worker.link, "a second time")
    house.until(lambda: bool(worker.link.lost))
    assert house.worker().serve() == job.id
    assert worker.link.lost == "hung"


def test_expired_while_waiting_for_its_second_try(house: House) -> None:
    worker = house.worker()
    job = house.admit(timeout_s=0.3)
    worker.expect(Run)
    worker.die()
    assert house.settled(job) is State.EXPIRED
    assert isinstance(job.error, DeadlineExceeded)


def test_cancelled_job_is_not_given_back(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    house.dispatcher.cancel(job)
    worker.die()
    house.until(lambda: bool(worker.link.lost))
    assert worker.link.jobs_lost == 0
    second = house.worker()
    second.expect_silence()


# --- workers that lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        lambda job: [Done("somebody-else", 0, 0, 0)],
        lambda job: [Failed("somebody-else", {})],
        lambda job: [Progress("somebody-else", 0, 1, 2)],
        lambda job: [Picture("somebody-else", 0, 1, 1)],
        lambda job: [Need("somebody-else", 0, 1)],
        lambda job: [Done(job, 0, 0, 0)],
        lambda job: [Picture(job, 0, 1, 7)],
        lambda job: [Need(job, 0, 10), Picture(job, 0, 1, 11)],
        lambda job: [Need(job, 0, 10), Picture(job, 0, 1, 0)],
        lambda job: [Need(job, 0, 10), Need(job, 0, 10)],
        lambda job: [Need(job, 0, 10), Picture(job, 0, 1, 10, 0)],
        lambda job: [Need(job, 1, 10)],
        lambda job: [Need(job, -1, 10)],
        lambda job: [Need(job, 0, 10, 0)],
        lambda job: [Need(job, 0, 10, -2)],
        lambda job: [Need(job, 0, 0)],
        lambda job: [Need(job, 0, -5)],
        lambda job: [Need(job, 0, 1 << 45)],
        lambda job: [Run(job, "/etc/passwd", 1.0)],
        lambda job: [Cancel(job)],
        lambda job: [Grant(job, 0, "/etc/passwd")],
        lambda job: [Stop()],
        lambda job: [Ready(0, "x")],
        lambda job: [Ready(-1, "x")],
        lambda job: [Ready(1 << 30, "x")],
    ],
)
def test_worker_that_lies_is_let_go_of_and_its_job_goes_to_another(
    house: House, lie: Callable[[str], list[Message]]
) -> None:
    liar = house.worker()
    job = house.admit()
    liar.expect(Run)
    liar.say(*lie(job.id))
    liar.expect_closed()
    assert liar.link.is_broken
    assert "protocol" in liar.link.lost
    assert liar.link.jobs_done == 0  # no work, for the count of deaths without any
    assert house.worker().serve() == job.id
    assert house.settled(job) is State.DONE


def test_worker_that_answers_twice_is_let_go_of_after_the_first_answer(house: House) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    worker.deliver(job.id)
    worker.say(Done(job.id, 0, 0, 0))
    worker.say(Done(job.id, 0, 0, 0))
    worker.expect_closed()
    assert job.state is State.DONE


@pytest.mark.parametrize("data", [b"\x80\x04K\x01.\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000])
def test_garbage_costs_the_worker_its_link(house: House, data: bytes) -> None:
    worker = house.worker()
    job = house.admit()
    worker.expect(Run)
    os.write(worker.end.reports.fileno(), data)
    worker.expect_closed()
    assert house.worker().serve() == job.id


def test_other_workers_go_on_while_one_lies(house: House) -> None:
    liar, honest = house.worker(), house.worker()
    job = house.admit()
    honest.expect(Run)
    liar.say(Stop())
    liar.expect_closed()
    honest.deliver(job.id)
    honest.say(Done(job.id, 0, 0, 0))
    assert house.settled(job) is State.DONE


def test_workers_that_hold_on_to_cancelled_jobs_are_judged_by_the_settings_they_have(house: House) -> None:
    hasty = Settings(models=house.settings.models, hang_limit_s=1.0)
    old = house.worker()
    house.dispatcher.add_model("toy", 4, hasty)
    new = house.worker()
    jobs = [house.admit(), house.admit()]
    old.expect(Run)
    new.expect(Run)
    for job in jobs:
        house.dispatcher.cancel(job)
    house.until(lambda: bool(new.link.lost))
    turned_at = house.dispatcher.turned_at
    house.until(lambda: house.dispatcher.turned_at > turned_at + 1.1)  # looked at once more, after the new limit
    assert (old.link.lost, new.link.lost) == ("", "it holds on to cancelled jobs")


def test_worker_that_does_not_read_stops_nobody_else(house: House) -> None:
    house.dispatcher.add_model("toy", 1000)
    house.dispatcher.add_model("other", 1)
    stopped, free = house.worker(capacity=1000, reads=False), house.worker(model="other")
    jobs = [house.admit() for _ in range(900)]  # their Runs fill its pipe
    house.until(lambda: house.dispatcher.status("toy").running == 900)
    assert stopped.link.has_backlog
    assert house.admit(model="other").id == free.serve()
    stopped.reader.start()
    assert [stopped.expect(Run).job for _ in jobs] == [job.id for job in jobs]
    house.until(lambda: not stopped.link.has_backlog)


def test_worker_that_asks_without_ever_reading_is_let_go_of(house: House) -> None:
    deaf = house.worker(capacity=2, reads=False)
    asked, waiting = house.admit(n=8000), house.admit(client="other")
    house.until(lambda: house.dispatcher.status("toy").running == 2)
    house.dispatcher.cancel(asked)
    with contextlib.suppress(LinkClosed):
        deaf.say(*(Need(asked.id, picture, 1) for picture in range(8000)))
    house.until(lambda: bool(deaf.link.lost))
    assert (deaf.link.lost, deaf.link.is_broken) == ("it does not read its commands", True)
    assert house.worker().serve() == waiting.id


class OddJob(Job):
    """A job that the first of what is told about it breaks."""

    def post(self, event: JobEvent) -> None:
        if self.attempts == 1:
            raise RuntimeError("a bug")
        Job.post(self, event)


def test_report_that_cannot_be_applied_sends_the_workers_jobs_to_another(house: House) -> None:
    worker = house.worker(capacity=2)
    plain = house.job()
    odd = OddJob("odd", "toy", Client("c"), plain.request, Deadline.after(60))
    house.jobs.append(odd)
    house.dispatcher.admit(odd)
    house.dispatcher.admit(plain)
    worker.expect(Run)
    worker.expect(Run)
    with contextlib.suppress(LinkClosed):  # the first of them has broken it
        worker.say(*(Prepared(job.id, "image2image", 8, 8, 1, 1, 1, 1) for job in (odd, plain)))
    worker.expect_closed()
    assert worker.link.is_broken
    second = house.worker()
    assert {second.serve(), second.serve()} == {odd.id, plain.id}
    assert [house.settled(odd), house.settled(plain)] == [State.DONE, State.DONE]


# --- workers come and go ------------------------------------------------------------------------------------------------


def test_retired_worker_finishes_what_it_holds(house: House) -> None:
    old = house.worker()
    job = house.admit()
    old.expect(Run)
    new = house.worker()
    house.dispatcher.retire(old.link)
    house.dispatcher.retire(old.link)
    old.expect(Stop)
    waiting = house.admit()
    assert new.expect(Run).job == waiting.id
    old.deliver(job.id)
    old.say(Done(job.id, 0, 0, 0))
    assert house.settled(job) is State.DONE
    old.expect_silence()


def test_worker_that_was_retired_before_it_was_ready_makes_no_model_ready(house: House) -> None:
    late = house.worker(ready=False)
    house.dispatcher.retire(late.link)
    late.expect(Stop)
    late.say(Ready(1, "fake"), Heartbeat("denoise"))
    house.until(lambda: late.link.phase == "denoise")
    with pytest.raises(NotReady, match="loading"):
        house.admit()


def test_worker_of_a_model_that_is_gone_is_sent_home(house: House) -> None:
    house.dispatcher.add_model("other", 1)
    house.dispatcher.remove_model("other")
    late = house.worker(model="other", ready=False)
    late.expect_closed()
    assert "removed" in late.link.lost
    house.dispatcher.retire(late.link)
    house.dispatcher.detach(late.link, "gone")
    worker = house.worker()
    job = house.admit()
    assert worker.serve() == job.id


def test_status_tells_how_a_model_stands(house: House) -> None:
    house.worker(capacity=2)
    third = [house.admit() for _ in range(3)][2]
    house.until(lambda: house.dispatcher.status("toy").running == 2)
    status = house.dispatcher.status("toy")
    assert (status.ready, status.reason, status.failed) == (True, "", False)
    assert (status.workers, status.capacity, status.queued, status.running) == (1, 2, 1, 2)
    assert status.engine == "fake"
    assert house.dispatcher.cancel(third)


def test_close_answers_what_is_left(tmp_path: Path) -> None:
    house = House(tmp_path)
    worker = house.worker()
    running, waiting = house.admit(), house.admit()
    worker.expect(Run)
    house.dispatcher.close()
    house.dispatcher.close()
    assert isinstance(running.error, Draining)
    assert isinstance(waiting.error, Draining)
    worker.expect_closed()
    assert not house.dispatcher.cancel(running)
    house.close()


def test_close_answers_what_is_left_though_calls_fail(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.worker().expect_silence()
    job = house.admit()
    unusable = [FakeWorker(), FakeWorker()]
    house.workers += unusable
    for worker in unusable:
        worker.link.close()
        house.dispatcher.attach(worker.link)
    house.dispatcher.close()
    assert isinstance(job.error, Draining)
    house.close()


def test_loop_turns_though_nothing_happens(house: House) -> None:
    before = house.dispatcher.turned_at
    deadline = Deadline.after(PATIENCE_S)
    while house.dispatcher.turned_at == before:
        assert not deadline.is_expired()
        threading.Event().wait(0.1)


def test_beats_reach_the_link(house: House) -> None:
    worker = house.worker()
    worker.say(Heartbeat("denoise", 3.0))
    house.until(lambda: worker.link.phase == "denoise")
    assert worker.link.allow_s == 3.0


def test_many_threads_admit_and_cancel_without_losing_a_job(house: House) -> None:
    house.dispatcher.add_model("toy", 10_000)
    worker = house.worker(capacity=8)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set() or not worker.heard.empty():
            try:
                message = worker.heard.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(message, Run):
                worker.say(Prepared(message.job, "image2image", 8, 8, 1, 1, 1, 1), Need(message.job, 0, 3))
            elif isinstance(message, Grant) and message.path:
                try:
                    fill(message.path, b"abc")
                except FileNotFoundError:
                    worker.say(Failed(message.job, {}))
                else:
                    worker.say(Picture(message.job, 0, 1, 3), Done(message.job, 0, 0, 0))
            elif isinstance(message, Grant):
                worker.say(Failed(message.job, {}))

    server = threading.Thread(target=serve)
    server.start()
    outcomes: list[State] = []

    def client(number: int) -> None:
        for k in range(50):
            job = Job(
                f"{number}-{k}", "toy", Client(str(number)), ImageRequest(task="edit", prompt="x"), Deadline.after(30)
            )
            house.dispatcher.admit(job)
            if k % 3 == 0:
                house.dispatcher.cancel(job)
            outcomes.append(house.settled(job))
            job.close()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    assert len(outcomes) == 300
    assert set(outcomes) == {State.DONE, State.CANCELLED}
    assert outcomes.count(State.DONE) >= 6 * 33
    house.until(lambda: house.dispatcher.status("toy").running == 0)
    assert house.dispatcher.in_flight() == 0
    stop.set()
    server.join(PATIENCE_S)
