"""Link and PipeWorkerLink over real pipes: order, limits, end-of-file, and what a Link records."""

from __future__ import annotations

import multiprocessing
import os
import select
from collections.abc import Iterator

import pytest

from ovserve.errors import LinkClosed, LinkGarbage
from ovserve.wire.codec import MESSAGE_BYTES, encode
from ovserve.wire.link import MAX_CAPACITY, Link
from ovserve.wire.local.pipes import PipeWorkerLink, open_link
from ovserve.wire.messages import Cancel, Done, Failed, Heartbeat, Message, Progress, Ready, Stop

CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture
def ends() -> Iterator[tuple[Link, PipeWorkerLink]]:
    link, end = open_link(CONTEXT, "toy", 0, 0)
    yield link, end
    for side in (link, end):
        side.close()


def read_all(link: Link) -> list[Message]:
    found: list[Message] = []
    while select.select([link.readiness], [], [], 0)[0]:
        found += link.receive()
    return found


def test_message_of_exactly_the_limit_is_delivered(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, end = ends
    spare = MESSAGE_BYTES - len(encode(Cancel("")))
    link.send(Cancel("x" * spare))
    assert end.receive() == Cancel("x" * spare)
    end.send(Failed("x" * (MESSAGE_BYTES - len(encode(Failed("", {})))), {}))
    assert len(read_all(link)) == 1


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_line_over_the_limit_raises_link_garbage_complete_or_not(
    ends: tuple[Link, PipeWorkerLink], tail: bytes
) -> None:
    link, end = ends
    os.write(end.reports.fileno(), b" " * MESSAGE_BYTES + tail)
    with pytest.raises(LinkGarbage, match="4096"):
        read_all(link)


def test_messages_arrive_complete_and_in_order_for_any_split(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, end = ends
    sent = [Progress("j", 0, step, 9) for step in range(9)]
    data = b"".join(encode(message) for message in sent)
    found = []
    for offset in range(0, len(data), 7):
        os.write(end.reports.fileno(), data[offset : offset + 7])
        found += link.receive()
    assert found == sent


def test_front_end_side_never_blocks_and_keeps_unsent_commands(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, end = ends
    assert link.receive() == []
    # Three times what the pipe holds, and the worker does not read.
    sent = [Cancel(f"{number:03} " + "x" * 1000) for number in range(200)]
    for message in sent:
        link.send(message)
    assert link.sent - link.consumed > 65536  # more than the pipe holds
    found = []
    while len(found) < len(sent):
        found.append(end.receive())
        assert link.receive() == []  # sends what the pipe has space for
    assert found == sent
    assert link.sent == link.consumed
    assert not select.select([link.readiness], [], [], 0)[0]  # a writable pipe does not wake without a backlog


def test_full_outbox_raises_link_closed(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, _ = ends

    def send_forever() -> None:
        while True:
            link.send(Stop())

    with pytest.raises(LinkClosed, match="does not read"):
        send_forever()


def test_dead_worker_is_end_of_file_after_its_last_reports(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, end = ends
    end.send(Heartbeat("idle"))
    end.close()
    assert link.receive() == [Heartbeat("idle")]
    with pytest.raises(LinkClosed):
        link.receive()
    with pytest.raises(LinkClosed):
        link.send(Stop())


def test_closed_front_end_is_end_of_file_for_the_worker(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, end = ends
    link.close()
    with pytest.raises(LinkClosed):
        end.receive()
    with pytest.raises(LinkClosed):
        end.send(Heartbeat("idle"))


def test_link_records_heartbeats_readiness_and_worker_failure_but_not_jobs(
    ends: tuple[Link, PipeWorkerLink],
) -> None:
    link, end = ends
    before = link.state.beat_at
    end.send(Ready(3, "toy", "because"))
    end.send(Heartbeat("denoise", 7.5))
    end.send(Done("j", 1, 2, 3))
    end.send(Failed("j2", {"message": "of a job"}))
    read_all(link)
    assert (link.state.phase, link.state.allow_s, link.state.jobs_done) == ("denoise", 7.5, 0)
    assert link.state.beat_at >= before
    assert link.state.ready == Ready(3, "toy", "because")
    assert link.state.failure is None
    end.send(Failed("", {"message": "of the worker"}))
    read_all(link)
    assert link.state.failure == Failed("", {"message": "of the worker"})


def test_ready_ends_the_long_silence_allowed_for_loading(ends: tuple[Link, PipeWorkerLink]) -> None:
    link, end = ends
    end.send(Heartbeat("load", 500.0))
    end.send(Ready(1, "toy"))
    read_all(link)
    assert (link.state.phase, link.state.allow_s) == ("idle", 0.0)


@pytest.mark.parametrize("capacity", [0, -1, MAX_CAPACITY + 1])
def test_capacity_out_of_range_raises_link_garbage_and_is_not_recorded(
    ends: tuple[Link, PipeWorkerLink], capacity: int
) -> None:
    link, end = ends
    end.send(Ready(capacity, "toy"))
    with pytest.raises(LinkGarbage, match="capacity"):
        read_all(link)
    assert link.state.ready is None
    end.send(Ready(MAX_CAPACITY, "toy"))
    read_all(link)
    assert link.state.ready == Ready(MAX_CAPACITY, "toy")


def test_link_name_has_model_index_and_incarnation() -> None:
    link, end = open_link(CONTEXT, "toy", 2, 5)
    assert link.name == "toy/2#5"
    link.close()
    end.close()
