"""Delays of clients whose jobs kill workers."""

from __future__ import annotations

from ovserve.dispatch.penalties import MAX_CLIENTS, MAX_DELAY_S, Penalties


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_delay_begins_with_the_third_death_and_doubles_to_a_maximum() -> None:
    penalties = Penalties(Clock())
    assert [penalties.note_death("a") for _ in range(6)] == [0, 0, 1, 2, 4, 8]
    assert max(penalties.note_death("a") for _ in range(100)) == MAX_DELAY_S


def test_only_the_client_is_delayed_and_only_until_the_end_of_its_delay() -> None:
    clock = Clock()
    penalties = Penalties(clock)
    for _ in range(3):
        assert not penalties.is_delayed("a")
        penalties.note_death("a")
    assert penalties.is_delayed("a")
    assert not penalties.is_delayed("b")
    clock.now += 1.0
    assert not penalties.is_delayed("a")


def test_finished_job_ends_the_delay_and_the_count() -> None:
    penalties = Penalties(Clock())
    for _ in range(9):
        penalties.note_death("a")
    penalties.note_done("a")
    assert not penalties.is_delayed("a")
    assert penalties.note_death("a") == 0
    penalties.note_done("unknown")


def test_remembered_clients_are_bounded() -> None:
    penalties = Penalties(Clock())
    for _ in range(9):
        penalties.note_death("oldest")
    for number in range(MAX_CLIENTS):
        penalties.note_death(str(number))
    assert not penalties.is_delayed("oldest")
