from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.wire.request import ImageRequest

REQUEST = ImageRequest(task="edit", prompt="x")


def ticket(address: str, name: str = "", key: str = "") -> Ticket:
    return Ticket(Job(name or address, "toy", Client(address, key), REQUEST, Deadline.after(60), wakeup=-1), "path")


def pop(queue: FairQueue, skipped: str = "") -> Ticket | None:
    """Take the next job of the first address that is not skipped, as a model does for a worker."""
    found = next((each for each in queue.heads() if each.address != skipped), None)
    if found is not None:
        queue.take(found)
    return found


def names(queue: FairQueue) -> list[str]:
    found = []
    while (taken := pop(queue)) is not None:
        found.append(taken.job.id)
    return found


def test_jobs_of_one_client_are_first_in_first_out() -> None:
    queue = FairQueue(10)
    for name in "abc":
        queue.push(ticket("client", name))
    assert names(queue) == ["a", "b", "c"]


def test_clients_take_turns_however_many_jobs_each_has() -> None:
    queue = FairQueue(100)
    for number in range(4):
        queue.push(ticket("a", f"a{number}"))
    queue.push(ticket("b", "b0"))
    for number in range(2):
        queue.push(ticket("c", f"c{number}"))
    assert names(queue) == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]


def test_client_that_adds_a_job_waits_for_the_turns_of_the_others() -> None:
    queue = FairQueue(100)
    for name in ("a0", "b0", "c0"):
        queue.push(ticket(name[0], name))
    assert pop(queue).job.id == "a0"  # type: ignore[union-attr]
    queue.push(ticket("a", "a1"))
    assert names(queue) == ["b0", "c0", "a1"]


def test_ineligible_client_is_passed_over_and_keeps_its_turn() -> None:
    queue = FairQueue(100)
    for name in ("a0", "a1", "b0", "b1", "c0"):
        queue.push(ticket(name[0], name))
    others = [pop(queue, skipped="a") for _ in range(2)]
    assert [taken.job.id for taken in others if taken] == ["b0", "c0"]
    assert names(queue) == ["a0", "b1", "a1"]


def test_requeued_job_goes_behind_those_of_other_clients_and_before_those_of_its_own() -> None:
    queue = FairQueue(10)
    killer = ticket("a", "killer")
    for name in ("a1", "b0", "b1", "c0"):
        queue.push(ticket(name[0], name))
    killer.failed_attempts = 1
    queue.requeue(killer)
    assert len(queue) == 5
    assert names(queue) == ["b0", "c0", "killer", "b1", "a1"]


def test_job_that_its_worker_had_not_read_keeps_its_turn() -> None:
    queue = FairQueue(10)
    for name in ("b0", "a1"):
        queue.push(ticket(name[0], name))
    for name in ("second", "first"):
        queue.requeue(ticket("a", name))
    assert names(queue) == ["first", "b0", "second", "a1"]


def test_requeued_jobs_do_not_count_against_the_share_of_their_address() -> None:
    queue = FairQueue(4)
    for number in range(3):
        queue.requeue(ticket("a", str(number)))
    assert queue.has_space_for(Client("a"))
    queue.push(ticket("a", "3"))
    assert not queue.has_space_for(Client("a"))
    assert names(queue) == ["2", "1", "0", "3"]


def test_remove_takes_a_job_out_wherever_it_is() -> None:
    queue = FairQueue(10)
    waiting, other, requeued = ticket("a"), ticket("a", "other"), ticket("b")
    for item in (waiting, other):
        queue.push(item)
    queue.requeue(requeued)
    assert queue.remove(waiting.job) is waiting
    assert queue.remove(waiting.job) is None
    assert queue.remove(requeued.job) is requeued
    assert len(queue) == 1
    assert names(queue) == ["other"]


def test_queue_accepts_limit_jobs_and_rejects_one_more() -> None:
    queue = FairQueue(3)
    for number in range(3):
        assert queue.has_space_for(Client(str(number)))
        queue.push(ticket(str(number)))
    assert not queue.has_space_for(Client("late"))
    assert queue.has_space_for(Client("late"), free_capacity=1)
    pop(queue)
    assert queue.has_space_for(Client("late"))


@pytest.mark.parametrize(
    ("limit", "by_key", "by_address"), [(1, 1, 1), (2, 2, 2), (8, 8, 8), (64, 51, 57), (810, 640, 720)]
)
def test_one_key_and_one_address_cannot_fill_the_queue(limit: int, by_key: int, by_address: int) -> None:
    queue = FairQueue(limit)
    while queue.has_space_for(Client("greedy", "k")):
        queue.push(ticket("greedy", key="k"))
    assert len(queue) == by_key
    assert queue.has_space_for(Client("greedy", "other")) == (by_key < limit)
    number = 0
    while queue.has_space_for(Client("greedy", str(number))):
        queue.push(ticket("greedy", key=str(number)))
        number += 1
    assert len(queue) == by_address
    assert queue.has_space_for(Client("other")) == (by_address < limit)


def test_a_new_key_for_each_job_gains_no_turns() -> None:
    queue = FairQueue(100)
    for number in range(5):
        queue.push(ticket("a", f"a{number}", key=str(number)))
    for number in range(2):
        queue.push(ticket("b", f"b{number}"))
    assert names(queue) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_keys_of_one_address_take_turns() -> None:
    queue = FairQueue(100)
    for name in ("a0", "a1", "a2", "b0"):
        queue.push(ticket("proxy", name, key=name[0]))
    queue.push(ticket("proxy", "none"))
    assert names(queue) == ["a0", "b0", "none", "a1", "a2"]


@given(st.lists(st.one_of(st.sampled_from("abcd"), st.none(), st.integers(0, 20)), max_size=60))
def test_jobs_are_not_lost_duplicated_or_reordered_within_a_client(steps: list[str | int | None]) -> None:
    queue = FairQueue(1000)
    waiting: list[Ticket] = []
    for step in steps:
        if isinstance(step, str):
            waiting.append(ticket(step))
            queue.push(waiting[-1])
        elif step is None:
            taken = pop(queue)
            assert (taken is None) == (not waiting)
            if taken is not None:
                first = next(item for item in waiting if item.job.client == taken.job.client)
                assert taken is first
                waiting.remove(taken)
        elif step < len(waiting):
            removed = waiting.pop(step)
            assert queue.remove(removed.job) is removed
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=80))
def test_between_two_turns_of_a_client_no_other_client_has_two(clients: list[str]) -> None:
    queue = FairQueue(1000)
    for client in clients:
        queue.push(ticket(client))
    order = names(queue)
    for client in set(clients):
        positions = [position for position, name in enumerate(order) if name == client]
        for before, after in itertools.pairwise(positions):
            between = order[before + 1 : after]
            assert len(between) == len(set(between))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("kl")), min_size=1, max_size=12), st.integers(0, 2))
def test_place_of_a_job_is_how_many_jobs_are_taken_before_it(clients: list[tuple[str, str]], requeued: int) -> None:
    queue = FairQueue(100)
    tickets = [ticket(address, f"{number}", key) for number, (address, key) in enumerate(clients)]
    for waiting in tickets[requeued:]:
        queue.push(waiting)
    for waiting in tickets[:requeued]:
        queue.requeue(waiting)
    places = {waiting.job.id: queue.ahead_of(waiting.job) for waiting in tickets}
    assert len(queue) == len(tickets)
    order = []
    while len(queue):
        head = next(queue.heads())
        queue.take(head)
        order.append(head.job.id)
    assert places == {name: place for place, name in enumerate(order)}
    assert queue.ahead_of(tickets[0].job) is None
