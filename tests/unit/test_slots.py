"""Slots: calls run in parallel, return results and exceptions, and end before close() returns."""

from __future__ import annotations

import threading
import weakref

import pytest

from ovserve.engines.stepwise.slots import Slots

WAIT_S = 10.0


@pytest.mark.usefixtures("leak_guard")
def test_calls_run_in_parallel_with_the_requests_of_their_slot() -> None:
    slots: Slots[str] = Slots(["requests 0", "requests 1"])
    meeting = threading.Barrier(2)
    assert (slots.count, slots.free, slots.busy) == (2, 2, 0)

    def run(requests: str) -> str:
        meeting.wait(WAIT_S)
        return requests

    slots.start("first", run)
    slots.start("second", run)
    assert (slots.free, slots.busy) == (0, 2)
    ended = []
    while slots.busy:
        ended += slots.wait()
    assert {call.subject for call in ended} == {"first", "second"}
    assert {call.result for call in ended} == {"requests 0", "requests 1"}
    assert {call.slot for call in ended} == {0, 1}
    assert all(call.error is None and call.started_at <= call.ended_at for call in ended)
    slots.close()


@pytest.mark.usefixtures("leak_guard")
def test_exception_is_returned_and_the_slot_remains_usable() -> None:
    slots: Slots[str] = Slots(["only"])

    def fail(_requests: str) -> None:
        raise RuntimeError("out of memory")

    slots.start("bad", fail)
    (bad,) = slots.wait()
    assert isinstance(bad.error, RuntimeError)
    assert bad.result is None
    slots.start("good", str.upper)
    (good,) = slots.wait()
    assert (good.result, good.error) == ("ONLY", None)
    slots.close()


@pytest.mark.usefixtures("leak_guard")
def test_close_waits_for_the_call_in_flight() -> None:
    slots: Slots[str] = Slots(["only"])
    may_end, ended = threading.Event(), threading.Event()

    def run(_requests: str) -> None:
        may_end.wait(WAIT_S)
        ended.set()

    slots.start("slow", run)
    may_end.set()
    slots.close()
    assert ended.is_set()


@pytest.mark.usefixtures("leak_guard")
def test_the_last_call_runs_in_the_thread_that_waits_unless_it_is_released() -> None:
    slots: Slots[str] = Slots(["requests 0", "requests 1"])
    here = threading.get_ident()
    meeting = threading.Barrier(2)

    def run(_requests: str) -> int:
        meeting.wait(WAIT_S)
        return threading.get_ident()

    slots.start("first", run)
    slots.start("second", run)
    ended = {}
    while slots.busy:
        ended |= {call.subject: call.result for call in slots.wait()}
    assert ended["second"] == here
    assert ended["first"] != here

    slots.start("released", lambda _requests: threading.get_ident())
    slots.release()
    (released,) = slots.wait()
    assert released.result != here
    slots.close()


@pytest.mark.usefixtures("leak_guard")
def test_close_runs_a_call_that_is_held() -> None:
    slots: Slots[str] = Slots(["only"])
    ended = threading.Event()
    slots.start("held", lambda _requests: ended.set())
    assert (slots.free, slots.busy) == (0, 1)
    assert not ended.is_set()
    slots.close()
    assert ended.is_set()


class Source:
    """What a call holds."""


@pytest.mark.usefixtures("leak_guard")
def test_slot_keeps_nothing_of_a_call_that_has_ended() -> None:
    slots: Slots[str] = Slots(["only"])
    source = Source()
    alive = weakref.ref(source)
    slots.start("first", lambda _requests, source=source: None)
    slots.release()
    slots.wait()
    del source
    slots.start("second", str.upper)  # in this thread: the slot's own waits
    slots.wait()
    assert alive() is None
    slots.close()
