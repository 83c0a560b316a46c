"""Run token: one ready thread runs at a time, in order, and a holder that keeps the token is preempted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from ovserve.deadline import Deadline
from ovserve.front import run_token as run_token_module
from ovserve.front.run_token import RunHandle, RunToken
from ovserve.front.transport import Transport
from tests.sockets import connected_pair


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def no_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable preemption, so that a token that is not released is noticed even on a slow machine."""
    monkeypatch.setattr(run_token_module, "MAX_HOLD_S", 1000.0)


@pytest.mark.usefixtures("no_preemption")
def test_one_thread_runs_at_a_time() -> None:
    token, inside, most = RunToken(), [0], [0]

    def work() -> None:
        handle = RunHandle(token)
        for _ in range(50):
            handle.acquire()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0)  # release the interpreter's lock
            inside[0] -= 1
            handle.release()

    with running(work), running(work), running(work):
        pass
    assert most == [1]


def test_release_without_acquire_does_nothing() -> None:
    handle = RunHandle(RunToken())
    handle.release()
    handle.acquire()
    handle.release()
    handle.release()


def test_stuck_holder_is_preempted_and_the_waiters_run_one_at_a_time() -> None:
    token, inside, most, done = RunToken(), [0], [0], [0]
    stuck = RunHandle(token)
    stuck.acquire()

    def work() -> None:
        handle = RunHandle(token)
        handle.acquire()
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(run_token_module.MAX_HOLD_S / 4)
        inside[0] -= 1
        done[0] += 1
        handle.release()

    with running(work), running(work), running(work), running(work):
        pass
    assert (done, most) == ([4], [1])
    stuck.release()  # no effect: the handle was preempted
    stuck.acquire()
    stuck.release()


@pytest.mark.usefixtures("no_preemption")
def test_busy_holder_yields_after_its_time_slice() -> None:
    token = RunToken()
    busy, other = RunHandle(token), RunHandle(token)
    busy.acquire()
    busy.yield_to_waiters()  # there are none yet
    had = threading.Event()

    def take_once() -> None:
        other.acquire()
        had.set()
        other.release()

    end = time.monotonic() + 20
    with running(take_once):
        while not had.is_set() and time.monotonic() < end:
            busy.yield_to_waiters()
        busy.release()
    assert had.is_set()


@pytest.mark.usefixtures("no_preemption")
@pytest.mark.parametrize(
    ("urgent", "expected"),
    [((), [0, 1, 2, 3, 4, 5, 6]), ((3, 5), [3, 5, 0, 1, 2, 4, 6]), (range(1, 7), [1, 2, 3, 4, 0, 5, 6])],
)
def test_waiters_get_the_token_in_order_and_urgent_ones_first(urgent: Sequence[int], expected: list[int]) -> None:
    token, order = RunToken(), list[int]()
    first = RunHandle(token)
    first.acquire()

    def work(number: int, waiting: threading.Barrier) -> None:
        handle = RunHandle(token)
        handle.is_urgent = number in urgent
        waiting.wait(20)
        handle.acquire()
        order.append(number)
        handle.release()

    threads = []
    for number in range(7):
        waiting = threading.Barrier(2)
        threads.append(threading.Thread(target=work, args=(number, waiting)))
        threads[-1].start()
        waiting.wait(20)
        until(lambda: token.waiting_count == len(threads))
    first.release()
    for thread in threads:
        thread.join(20)
    assert order == expected


def go_through(handle: RunHandle, had: threading.Event) -> None:
    handle.acquire()
    had.set()
    handle.release()


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


def fill_in_part(transport: Transport) -> None:
    with connected_pair() as (ours, theirs):
        partly = Transport(theirs, 5, transport.run_handle)
        ours.sendall(b"ab")
        assert partly.fill(memoryview(bytearray(4)), 0.2) == 2


def receive_beyond(transport: Transport) -> None:
    with pytest.raises(TimeoutError):
        transport.receive_beyond(memoryview(bytearray(4)), 0.2)


WAITS: dict[str, Callable[[Transport], None]] = {
    "receive": receive,
    "fill": fill,
    "the rest of fill": fill_in_part,
    "receive_beyond": receive_beyond,
    "wait": wait_for_a_descriptor,
}


@pytest.mark.usefixtures("no_preemption")
@pytest.mark.parametrize("way", WAITS)
def test_wait_for_the_client_releases_the_token(way: str) -> None:
    token, had = RunToken(), threading.Event()
    mine, other = RunHandle(token), RunHandle(token)

    def take_once() -> None:
        other.acquire()
        had.set()
        other.release()

    mine.acquire()
    with connected_pair() as (_, theirs), running(take_once):
        WAITS[way](Transport(theirs, 5, mine))
        assert had.wait(10)
        mine.release()


@pytest.mark.usefixtures("no_preemption")
def test_send_that_blocks_releases_the_token() -> None:
    token = RunToken()
    mine, other = RunHandle(token), RunHandle(token)
    content = b"x" * 20_000_000
    with connected_pair() as (ours, theirs):

        def read() -> None:  # only after it has held the token
            other.acquire()
            other.release()
            left = len(content)
            while left:
                left -= len(ours.recv(1 << 20))

        mine.acquire()
        with running(read):
            assert Transport(theirs, 20, mine).send([content]) == len(content)
            mine.release()


@pytest.mark.usefixtures("no_preemption")
def test_calls_that_do_not_block_keep_the_token() -> None:
    token = RunToken()
    mine, other, had = RunHandle(token), RunHandle(token), threading.Event()
    mine.acquire()

    with connected_pair() as (ours, theirs), running(lambda: go_through(other, had)):
        until(lambda: token.waiting_count == 1)
        transport = Transport(theirs, 5, mine)
        ours.sendall(b"abcdefgh")
        assert transport.receive(5) == b"abcdefgh"
        assert transport.send([b"answer"]) == 6
        assert not had.is_set()
        mine.release()


@pytest.mark.usefixtures("no_preemption")
def test_fill_yields_to_waiters_after_the_time_slice() -> None:
    token = RunToken()
    mine, other, had = RunHandle(token), RunHandle(token), threading.Event()
    mine.acquire()

    with connected_pair() as (ours, theirs), running(lambda: go_through(other, had)):
        until(lambda: token.waiting_count == 1)
        time.sleep(2 * run_token_module.TIME_SLICE_S)
        ours.sendall(b"abcd")
        assert Transport(theirs, 5, mine).fill(memoryview(bytearray(4)), 5) == 4
        assert had.is_set()
        mine.release()
