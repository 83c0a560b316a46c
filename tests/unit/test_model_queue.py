from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job
from ovserve.dispatch.model_queue import MAX_UNPREPARED, AttachedWorker, ModelQueue
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.wire.memory.link import open_memory_link
from ovserve.wire.messages import Ready
from ovserve.wire.request import ImageRequest


def ticket(name: str, failed_attempts: int = 0, client: str = "", input_pixels: int = 0) -> Ticket:
    request = ImageRequest(task="edit", prompt="x", input_pixels=input_pixels)
    job = Job(name, "toy", Client(client or name), request, Deadline.after(60), wakeup=-1)
    return Ticket(job, "path", failed_attempts)


def taken(model: ModelQueue) -> tuple[AttachedWorker, str] | None:
    """Take the next job as the dispatcher does; return its worker and its name."""
    found = model.take_next()
    if found is None:
        return None
    worker, next_ticket = found
    worker.assigned[next_ticket.job.id] = next_ticket
    return worker, next_ticket.job.id


@pytest.fixture
def model() -> Iterator[ModelQueue]:
    """A model with two workers of capacity 4 and one assigned job each."""
    made = ModelQueue("toy", FairQueue(64), largest_picture_bytes=1)
    for index in range(2):
        link, end = open_memory_link("toy", index, 0)
        end.close()
        link.update(ready=Ready(4, "toy"))
        made.workers.append(
            AttachedWorker(link, made, hang_limit_s=10.0, assigned={f"assigned{index}": ticket(f"assigned{index}")})
        )
    yield made
    for worker in made.workers:
        worker.link.close()


def test_worker_reserved_for_an_isolated_job_takes_no_other_from_the_queue(model: ModelQueue) -> None:
    model.workers[1].link.update(ready=None)
    model.queue.requeue(ticket("isolated", failed_attempts=1))
    model.queue.push(ticket("waiting"))
    assert taken(model) is None
    assert sorted(each.job.id for each in model.queue) == ["isolated", "waiting"]
    model.workers[0].assigned.clear()
    assert taken(model) == (model.workers[0], "isolated")
    assert taken(model) is None


def test_jobs_of_other_clients_that_wait_precede_an_isolated_job(model: ModelQueue) -> None:
    model.workers[1].link.update(ready=None)
    for name in ("a", "b"):
        model.queue.push(ticket(name))
    model.queue.requeue(ticket("isolated", failed_attempts=1))
    for name in ("c", "d"):
        model.queue.push(ticket(name))
    assert [taken(model), taken(model), taken(model)] == [(model.workers[0], "a"), (model.workers[0], "b"), None]


def test_other_workers_get_jobs_while_one_is_reserved(model: ModelQueue) -> None:
    reserved, other = model.workers
    other.assigned["more"] = ticket("more")
    for requeued in (ticket("isolated", failed_attempts=1), ticket("second", failed_attempts=1)):
        model.queue.requeue(requeued)
    model.queue.push(ticket("shared"))
    assert taken(model) == (other, "shared")
    reserved.assigned.clear()
    assert taken(model) == (reserved, "isolated")
    assert taken(model) is None  # the other worker becomes free for the second one


def test_delayed_address_is_passed_over(model: ModelQueue) -> None:
    for name in ("a", "b"):
        model.queue.push(ticket(name))
    found = model.take_next(lambda address: address == "a")
    assert found is not None
    assert found[1].job.id == "b"
    assert model.take_next(lambda address: address == "a") is None


def only_worker(model: ModelQueue) -> AttachedWorker:
    """Take the second worker away and the jobs of the first."""
    model.workers.pop().link.close()
    model.workers[0].assigned.clear()
    return model.workers[0]


def test_client_that_fills_a_worker_leaves_a_place_for_another(model: ModelQueue) -> None:
    worker = only_worker(model)
    for number in range(6):
        model.queue.push(ticket(f"a{number}", client="a"))
    assert [taken(model) for _ in range(5)] == [(worker, f"a{number}") for number in range(4)] + [None]
    for name in ("b0", "b1", "c0"):
        model.queue.push(ticket(name, client=name[0]))
    assert taken(model) == (worker, "b0")
    assert taken(model) is None


def test_unprepared_jobs_of_one_client_in_a_worker_are_bounded(model: ModelQueue) -> None:
    worker = only_worker(model)
    worker.link.update(ready=Ready(10, "toy"))
    for number in range(8):
        model.queue.push(ticket(f"a{number}", client="a"))
    for _ in range(MAX_UNPREPARED):
        assert taken(model) is not None
    assert taken(model) is None
    worker.assigned["a0"].is_prepared = True
    assert taken(model) == (worker, f"a{MAX_UNPREPARED}")


def test_heavy_unprepared_jobs_leave_places_for_light_ones(model: ModelQueue) -> None:
    worker = only_worker(model)
    for number in range(4):
        model.queue.push(ticket(f"heavy{number}", input_pixels=50_000_000))
    model.queue.push(ticket("light", input_pixels=1_000_000))
    assert [taken(model) for _ in range(4)] == [(worker, name) for name in ("heavy0", "heavy1", "light")] + [None]
    worker.assigned["heavy0"].is_prepared = True
    assert taken(model) == (worker, "heavy2")
