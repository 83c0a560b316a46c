"""Taking turns: one thread of those that are ready runs, and nobody waits for ever for one that does not let go."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ovserve.deadline import Deadline
from ovserve.front import turns as turns_module
from ovserve.front.transport import Transport
from ovserve.front.turns import Turn, Turns
from tests.sockets import connected_pair


@contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(20)
        assert not thread.is_alive()


def test_one_thread_runs_at_a_time_as_long_as_each_is_quick() -> None:
    turns, inside, most = Turns(), [0], [0]

    def work() -> None:
        turn = Turn(turns)
        for _ in range(50):
            turn.take()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0)  # the interpreter's lock goes to whoever wants it
            inside[0] -= 1
            turn.give()

    with running(work), running(work), running(work):
        pass
    assert most == [1]


def test_a_turn_that_is_not_held_can_be_given_away() -> None:
    turn = Turn(Turns())
    turn.give()
    turn.take()
    turn.give()
    turn.give()


def test_a_holder_that_does_not_let_go_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PATIENCE_S", 0.05)
    turns = Turns()
    stuck, other = Turn(turns), Turn(turns)
    stuck.take()
    other.take()
    other.give()
    monkeypatch.setattr(turns_module, "PATIENCE_S", 1000.0)
    other.take()  # at once: the stuck one is out of the game
    other.give()
    stuck.give()
    stuck.take()
    stuck.give()


def test_who_always_has_more_to_do_lets_the_others_in_after_its_slice() -> None:
    turns = Turns()
    busy, other = Turn(turns), Turn(turns)
    busy.take()
    busy.pass_on()  # to nobody
    had = threading.Event()

    def take_once() -> None:
        other.take()
        had.set()
        other.give()

    end = time.monotonic() + 20
    with running(take_once):
        while not had.is_set() and time.monotonic() < end:
            busy.pass_on()
        busy.give()
    assert had.is_set()


@pytest.mark.parametrize(("urgent", "expected"), [(None, [0, 1, 2, 3]), (3, [3, 0, 1, 2])])
def test_turns_come_in_the_order_of_asking_but_for_the_urgent(urgent: int | None, expected: list[int]) -> None:
    turns, order = Turns(), list[int]()
    first = Turn(turns)
    first.take()

    def work(number: int, waiting: threading.Barrier) -> None:
        turn = Turn(turns)
        turn.is_urgent = number == urgent
        waiting.wait(20)
        turn.take()
        order.append(number)
        turn.give()

    threads = []
    for number in range(4):
        waiting = threading.Barrier(2)
        threads.append(threading.Thread(target=work, args=(number, waiting)))
        threads[-1].start()
        waiting.wait(20)
        while len(threads) > turns.length:
            time.sleep(0.001)
    first.give()
    for thread in threads:
        thread.join(20)
    assert order == expected


def wait_for_a_descriptor(transport: Transport) -> None:
    descriptor = os.eventfd(0)
    try:
        transport.wait(descriptor, Deadline.after(0.2))
    finally:
        os.close(descriptor)


def receive(transport: Transport) -> None:
    with pytest.raises(TimeoutError):
        transport.receive(0.2)


def fill(transport: Transport) -> None:
    with pytest.raises(TimeoutError):
        transport.fill(memoryview(bytearray(4)), 0.2)


WAITS: dict[str, Callable[[Transport], None]] = {
    "receive": receive,
    "fill": fill,
    "wait": wait_for_a_descriptor,
    "linger": lambda transport: transport.linger(10, 0.2),
}


@pytest.mark.parametrize("way", WAITS)
def test_a_wait_for_the_client_gives_the_turn_away(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PATIENCE_S", 1000.0)  # so that a turn that is kept shows
    turns, had = Turns(), threading.Event()
    mine, other = Turn(turns), Turn(turns)

    def take_once() -> None:
        other.take()
        had.set()
        other.give()

    mine.take()
    with connected_pair() as (_, theirs), running(take_once):
        WAITS[way](Transport(theirs, 5, mine))
        assert had.wait(10)
        mine.give()


def test_a_long_answer_gives_the_turn_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PATIENCE_S", 1000.0)
    turns = Turns()
    mine, other = Turn(turns), Turn(turns)
    content = b"x" * 20_000_000
    with connected_pair() as (ours, theirs):

        def read() -> None:  # only once it is the reader's turn
            other.take()
            other.give()
            left = len(content)
            while left:
                left -= len(ours.recv(1 << 20))

        mine.take()
        with running(read):
            assert Transport(theirs, 20, mine).send([content]) == len(content)
            mine.give()


def test_what_can_be_had_at_once_keeps_the_turn() -> None:
    turns = Turns()
    mine = Turn(turns)
    mine.take()
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5, mine)
        ours.sendall(b"abcdefgh")
        taken: list[bool] = []

        def attempt() -> None:
            before = time.monotonic()
            Turn(turns).take()
            taken.append(time.monotonic() - before < turns_module.PATIENCE_S / 2)

        with running(attempt):
            assert transport.fill(memoryview(bytearray(4)), 5) == 4
            assert transport.receive(5) == b"efgh"
            assert transport.send([b"answer"]) == 6
        assert taken == [False]
        mine.give()
