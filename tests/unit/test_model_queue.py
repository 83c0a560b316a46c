from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job
from ovserve.dispatch.model_queue import AttachedWorker, ModelQueue
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.wire.memory.link import open_memory_link
from ovserve.wire.messages import Ready
from ovserve.wire.request import ImageRequest


def ticket(name: str, failed_attempts: int = 0) -> Ticket:
    request = ImageRequest(task="edit", prompt="x")
    return Ticket(Job(name, "toy", Client(name), request, Deadline.after(60), wakeup=-1), "path", failed_attempts)


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
    for requeued in (ticket("isolated", failed_attempts=1), ticket("shared")):
        model.queue.requeue(requeued)
    model.queue.push(ticket("waiting"))
    assert model.take_next() is None
    assert sorted(each.job.id for each in model.queue) == ["isolated", "shared", "waiting"]
    model.workers[0].assigned.clear()
    taken = model.take_next()
    assert taken is not None
    assert (taken[0], taken[1].job.id) == (model.workers[0], "isolated")


def test_other_workers_get_jobs_while_one_is_reserved(model: ModelQueue) -> None:
    reserved, other = model.workers
    other.assigned["more"] = ticket("more")
    for requeued in (ticket("isolated", failed_attempts=1), ticket("shared")):
        model.queue.requeue(requeued)
    taken = model.take_next()
    assert taken is not None
    assert (taken[0], taken[1].job.id) == (other, "shared")
    reserved.assigned.clear()
    taken = model.take_next()
    assert taken is not None
    assert (taken[0], taken[1].job.id) == (reserved, "isolated")
