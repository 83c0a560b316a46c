"""Slots and fleets: crash loops, backoff, limits on silence, and what starts when."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ovserve.fleet.desired import DesiredModel
from ovserve.fleet.fleets import Fleet, Slot, load_failure
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.link import Link
from ovserve.wire.memory.launcher import MemoryProcess
from ovserve.wire.memory.link import open_memory_link
from ovserve.wire.messages import Failed, Heartbeat, Ready
from tests.toys import toy_profile

SETTINGS = Settings(
    models=(ModelSettings(name="toy", replicas=2),),
    crash_loop_limit=3,
    restart_delay_s=1.0,
    max_restart_delay_s=10.0,
    failed_retry_s=100.0,
    load_timeout_s=300.0,
    hang_limit_s=60.0,
    idle_hang_limit_s=6.0,
)


@pytest.fixture
def links() -> Iterator[list[Link]]:
    made: list[Link] = []
    yield made
    for link in made:
        link.close()


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet(DesiredModel(toy_profile(), SETTINGS.models[0], SETTINGS))
    made.fill_slots(2)
    return made


def new_link(links: list[Link], *, ready: bool = True) -> Link:
    link, end = open_memory_link("toy", 0, 0)
    end.close()
    links.append(link)
    link.update(ready=Ready(1, "toy") if ready else None)
    return link


def die(fleet: Fleet, slot: Slot, link: Link, *, after_s: float = 0.0, reason: str = "killed") -> None:
    now = time.monotonic()
    slot.link = link
    if link.state.ready:
        fleet.note_ready(slot, link, now)
    fleet.note_death(slot, link, reason, now + after_s)


def test_deaths_in_a_row_without_a_finished_job_fail_the_model(fleet: Fleet, links: list[Link]) -> None:
    for _ in range(2):
        die(fleet, fleet.slots[0], new_link(links))
        assert fleet.failure == ""
    die(fleet, fleet.slots[1], new_link(links), reason="killed by signal 11")
    assert fleet.failure == "3 workers in a row died without finishing a job; the last: killed by signal 11"


def test_worker_that_finished_a_job_resets_the_count(fleet: Fleet, links: list[Link]) -> None:
    for number in range(12):
        link = new_link(links)
        link.update(jobs_done=int(number % 3 == 2))
        die(fleet, fleet.slots[0], link)
    assert fleet.failure == ""


def test_job_finished_by_another_worker_resets_the_models_count_but_not_the_slots(
    fleet: Fleet, links: list[Link]
) -> None:
    neighbour = fleet.slots[1]
    neighbour.link = new_link(links)
    for number in range(6):
        neighbour.link.update(jobs_done=number)
        die(fleet, fleet.slots[0], new_link(links))
    assert (fleet.deaths, fleet.slots[0].deaths) == (1, 6)


def test_model_with_a_ready_worker_is_not_failed(fleet: Fleet, links: list[Link]) -> None:
    neighbour = fleet.slots[1]
    neighbour.link = new_link(links)
    fleet.note_ready(neighbour, neighbour.link, time.monotonic())
    for _ in range(9):
        die(fleet, fleet.slots[0], new_link(links, ready=False))
    assert fleet.failure == ""
    die(fleet, neighbour, neighbour.link)
    assert fleet.failure != ""


def test_crash_loop_of_one_slot_is_reported_while_another_works(fleet: Fleet, links: list[Link]) -> None:
    neighbour = fleet.slots[0]
    neighbour.link = new_link(links)
    fleet.note_ready(neighbour, neighbour.link, time.monotonic())
    for number in range(3):
        neighbour.link.update(jobs_done=number)
        assert fleet.crash_loop_reason == ""
        die(fleet, fleet.slots[1], new_link(links, ready=False))
    assert fleet.crash_loop_reason == "worker 1 died 3 times in a row without finishing a job"


def test_deaths_after_long_idle_lives_do_not_count_but_deaths_with_a_job_do(fleet: Fleet, links: list[Link]) -> None:
    for _ in range(9):
        die(fleet, fleet.slots[0], new_link(links), after_s=11.0)
    assert (fleet.failure, fleet.deaths) == ("", 0)
    for _ in range(3):
        link = new_link(links)
        link.update(jobs_lost=1)
        die(fleet, fleet.slots[0], link, after_s=11.0)
    assert fleet.failure != ""


def test_second_death_with_the_same_job_does_not_count(fleet: Fleet, links: list[Link]) -> None:
    for number in range(4):
        link = new_link(links)
        link.update(jobs_lost=1, lost_retried_job=bool(number % 2))
        die(fleet, fleet.slots[0], link)
    assert (fleet.failure, fleet.deaths) == ("", 2)


def test_deaths_with_the_jobs_of_one_client_count_once(fleet: Fleet, links: list[Link]) -> None:
    for _ in range(9):
        link = new_link(links)
        link.update(jobs_lost=1, lost_client="hostile")
        die(fleet, fleet.slots[0], link)
    assert (fleet.failure, fleet.deaths, fleet.slots[0].deaths) == ("", 1, 1)
    for client in ("b", "c"):
        link = new_link(links)
        link.update(jobs_lost=1, lost_client=client)
        die(fleet, fleet.slots[0], link)
    assert fleet.failure != ""


def test_deaths_with_the_jobs_of_one_client_count_again_after_a_finished_job(fleet: Fleet, links: list[Link]) -> None:
    for done in (0, 0, 1, 0, 0):
        link = new_link(links)
        link.update(jobs_lost=1, lost_client="hostile", jobs_done=done)
        die(fleet, fleet.slots[0], link)
    assert (fleet.failure, fleet.deaths) == ("", 1)


def test_reported_load_failure_fails_the_model_at_once(fleet: Fleet, links: list[Link]) -> None:
    link = new_link(links, ready=False)
    link.update(failure=Failed("", {"message": "no such device"}))
    die(fleet, fleet.slots[0], link, reason=load_failure(link))
    assert fleet.failure == "no such device"


def test_reported_load_failure_of_a_model_that_was_ready_is_retried(fleet: Fleet, links: list[Link]) -> None:
    die(fleet, fleet.slots[0], new_link(links))
    link = new_link(links, ready=False)
    link.update(failure=Failed("", {"message": "device busy"}))
    die(fleet, fleet.slots[0], link)
    assert fleet.failure == ""


def test_worker_that_was_lost_with_its_cluster_does_not_count(fleet: Fleet, links: list[Link]) -> None:
    for _ in range(5):
        link, end = open_memory_link("toy", 0, 0)
        links.append(link)
        slot = fleet.slots[0]
        slot.process = process = MemoryProcess("toy/0#0", 1, end)
        process.lost = True
        process.exit("the cluster was lost")
        die(fleet, slot, link)
    assert fleet.failure == ""
    assert slot.deaths == 0


def test_other_slots_start_at_once_when_a_failed_model_is_ready_again(fleet: Fleet, links: list[Link]) -> None:
    first, second = fleet.slots
    fleet.failure, now = "reason", time.monotonic()
    first.restart_at = second.restart_at = now + SETTINGS.failed_retry_s
    fleet.note_ready(first, new_link(links), now)
    assert second.restart_at <= now


def test_one_worker_starts_first_and_the_others_when_it_is_ready(fleet: Fleet, links: list[Link]) -> None:
    first, second = fleet.slots
    assert fleet.may_start(first)
    assert not fleet.may_start(second)
    fleet.note_ready(first, new_link(links), time.monotonic())
    assert fleet.may_start(second)


def test_ready_worker_clears_the_failure_and_the_others_may_start(fleet: Fleet, links: list[Link]) -> None:
    first, second = fleet.slots
    fleet.note_ready(first, new_link(links), time.monotonic())
    fleet.failure = "reason"
    assert fleet.may_start(first)
    assert not fleet.may_start(second)
    fleet.note_ready(first, new_link(links), time.monotonic())
    assert fleet.failure == ""
    assert fleet.may_start(second)


def test_options_chosen_by_the_first_worker_apply_to_all_later_ones(fleet: Fleet, links: list[Link]) -> None:
    first, second = fleet.slots
    link = new_link(links)
    link.update(
        ready=Ready(1, "toy", "", {"threads": 1, "streams": 2, "max_batch": 0, "path": "/nowhere", "replicas": 9})
    )
    fleet.note_ready(first, link, time.monotonic())
    later = new_link(links)
    later.ready = Ready(1, "toy", "", {"threads": 7, "streams": -1, "max_batch": True})
    fleet.note_ready(second, later, time.monotonic())
    chosen = fleet.model
    assert (chosen.threads, chosen.streams, chosen.path, chosen.replicas) == (1, 2, None, 2)


def test_backoff_doubles_up_to_its_limit_with_jitter(fleet: Fleet) -> None:
    slot = fleet.slots[0]
    for deaths, middle in ((0, 1), (1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (60, 10), (10**6, 10)):
        slot.deaths = deaths
        delays = [slot.backoff_s() for _ in range(50)]
        assert 0.75 * middle <= min(delays) < max(delays) <= 1.25 * middle
    fleet.failure = "reason"
    assert slot.backoff_s() == 100.0


@pytest.mark.parametrize(
    ("ready", "beat", "limit_s"),
    [
        (False, Heartbeat("spawn"), 300),
        (False, Heartbeat("load", 500.0), 500),
        (False, Heartbeat("warm-up", 20.0), 300),
        (True, Heartbeat("idle"), 6),
        (True, Heartbeat("idle", 7.0), 7),
        (True, Heartbeat("denoise"), 60),
        (True, Heartbeat("decode", 90.0), 90),
        (True, Heartbeat("decode", 1e15), 300),
        (True, Heartbeat("idle", 1e15), 300),
        (True, Heartbeat("encode", 1.0), 60),
    ],
)
def test_silence_limit_depends_on_the_phase(
    fleet: Fleet, links: list[Link], ready: bool, beat: Heartbeat, limit_s: float
) -> None:
    link = new_link(links, ready=ready)
    link.update(phase=beat.phase, allow_s=beat.allow_s)
    assert fleet.slots[0].silence_limit_s(link) == limit_s


def test_fleet_with_too_many_written_off_processes_starts_no_more_and_fails(fleet: Fleet, links: list[Link]) -> None:
    first, second = fleet.slots
    fleet.was_ready = True
    fleet.written_off = 2  # as many as replicas: one more may be started for each slot
    assert fleet.may_start(first)
    assert fleet.may_start(second)
    fleet.written_off = 3
    assert not fleet.may_start(first)
    second.process = MemoryProcess("toy/1#0", 1, open_memory_link("toy", 1, 0)[1])
    die(fleet, first, new_link(links, ready=False))
    assert fleet.failure == ""  # one process still runs, and may become ready
    die(fleet, second, new_link(links, ready=False), reason="hung")
    assert fleet.failure.startswith("3 processes of this model have survived SIGKILL")
    assert fleet.failure.endswith("hung")
    fleet.written_off = 2
    assert fleet.may_start(first)
    assert not fleet.may_start(second)
    assert first.backoff_s() == SETTINGS.failed_retry_s


class CountedProcess(MemoryProcess):
    """A worker that counts the measurements of its memory."""

    measurements = 0

    def memory_bytes(self) -> int:
        self.measurements += 1
        return self.resident


def test_memory_is_measured_often_while_it_changes_and_rarely_while_it_does_not(fleet: Fleet) -> None:
    _, end = open_memory_link("toy", 0, 0)
    slot = fleet.slots[0]
    process = slot.process = CountedProcess("toy/0#0", 1, end)
    for tick in range(40):  # ten seconds of growth
        process.resident = (tick + 10) << 24
        slot.measure(100 + tick / 4, process.resident)
    assert process.measurements == 40
    assert slot.used_bytes == slot.peak_bytes == process.resident
    process.measurements = 0
    for tick in range(40):  # mapped weights are read while it loads
        slot.measure(110 + tick / 4, process.resident)
    assert process.measurements == 40
    process.measurements = 0
    slot.ready_at = 119.9
    for tick in range(40):  # ten seconds without a change
        slot.measure(120 + tick / 4, process.resident + tick % 2)
    assert 4 <= process.measurements <= 6
    process.resident = 1 << 24  # less than the peak, and seen in the next tick
    slot.measure(130.3, process.resident)
    assert (slot.used_bytes, slot.peak_bytes) == (1 << 24, 49 << 24)
