from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job
from ovserve.dispatch.model_queue import AttachedWorker, ModelQueue
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.wire.local.pipes import open_link
from ovserve.wire.messages import Ready
from ovserve.wire.request import ImageRequest

CONTEXT = multiprocessing.get_context("spawn")


def ticket(name: str, deaths: int = 0) -> Ticket:
    request = ImageRequest(task="edit", prompt="x")
    return Ticket(Job(name, "toy", Client(name), request, Deadline.after(60), wakeup=-1), "path", deaths)


@pytest.fixture
def model() -> Iterator[ModelQueue]:
    """With two workers of four places, each of which holds one job."""
    made = ModelQueue("toy", FairQueue(64), largest_picture_bytes=1)
    for index in range(2):
        link, end = open_link(CONTEXT, "toy", index, 0)
        end.close()
        link.ready = Ready(4, "toy")
        made.workers.append(
            AttachedWorker(link, made, hang_limit_s=10.0, held={f"held{index}": ticket(f"held{index}")})
        )
    yield made
    for worker in made.workers:
        worker.link.close()


def test_worker_that_is_kept_free_for_a_lone_job_takes_none_out_of_the_queue(model: ModelQueue) -> None:
    model.workers[1].link.ready = None
    for lone_or_unread in (ticket("lone", deaths=1), ticket("unread")):
        model.queue.requeue(lone_or_unread)
    model.queue.push(ticket("waiting"))
    assert model.take_next() is None
    assert sorted(each.job.id for each in model.queue) == ["lone", "unread", "waiting"]
    model.workers[0].held.clear()
    taken = model.take_next()
    assert taken is not None
    assert (taken[0], taken[1].job.id) == (model.workers[0], "lone")


def test_other_workers_go_on_beside_the_one_that_is_kept_free(model: ModelQueue) -> None:
    emptiest, other = model.workers
    other.held["more"] = ticket("more")
    for lone_or_unread in (ticket("lone", deaths=1), ticket("unread")):
        model.queue.requeue(lone_or_unread)
    taken = model.take_next()
    assert taken is not None
    assert (taken[0], taken[1].job.id) == (other, "unread")
    emptiest.held.clear()
    taken = model.take_next()
    assert taken is not None
    assert (taken[0], taken[1].job.id) == (emptiest, "lone")
