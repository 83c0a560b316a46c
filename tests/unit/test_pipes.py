from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import select
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import LinkClosed, LinkGarbage
from ovserve.wire.blobs import Blob
from ovserve.wire.codec import MESSAGE_BYTES, decode, encode
from ovserve.wire.local.pipes import MAX_CAPACITY, Link, WorkerEnd, open_link
from ovserve.wire.messages import (
    Cancel,
    Done,
    Failed,
    Grant,
    Heartbeat,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Stop,
)
from ovserve.wire.request import ImageRequest

CONTEXT = multiprocessing.get_context("spawn")

short = st.text(max_size=60)
whole = st.integers(min_value=-1, max_value=2**40)
seconds = st.floats(min_value=0, max_value=1e9, allow_nan=False)
messages = st.one_of(
    st.builds(Run, short, short, seconds, st.booleans()),
    st.builds(Cancel, short),
    st.builds(Grant, short, whole, short),
    st.builds(Stop),
    st.builds(Ready, whole, short, short, st.dictionaries(short, whole, max_size=3)),
    st.builds(Heartbeat, short, seconds),
    st.builds(Prepared, short, short, whole, whole, whole, whole, whole, whole, short),
    st.builds(Progress, short, whole, whole, whole),
    st.builds(Need, short, whole, whole, whole),
    st.builds(Picture, short, whole, whole, whole, whole),
    st.builds(Done, short, seconds, seconds, seconds),
    st.builds(Failed, short, st.dictionaries(short, st.one_of(short, whole, st.none()), max_size=3)),
)
requests = st.builds(
    ImageRequest,
    task=st.sampled_from(["edit", "generation", "variation"]),
    prompt=st.text(),
    negative_prompt=st.text(),
    images=st.lists(st.builds(Blob, short, whole, whole), max_size=3).map(tuple),
    mask=st.one_of(st.none(), st.builds(Blob, short, whole, whole)),
    n=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
    strength=st.one_of(st.none(), st.floats(0, 1)),
    metadata=st.booleans(),
)


@pytest.fixture
def ends() -> Iterator[tuple[Link, WorkerEnd]]:
    link, end = open_link(CONTEXT, "toy", 0, 0)
    yield link, end
    for side in (link, end):
        side.close()


def read_all(link: Link) -> list[Message]:
    found: list[Message] = []
    while select.select([link.fileno()], [], [], 0)[0]:
        found += link.receive()
    return found


@given(messages)
def test_every_message_survives_encoding(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line) <= MESSAGE_BYTES
    assert decode(line) == message


@given(requests)
def test_every_request_survives_its_segment(request: ImageRequest) -> None:
    assert ImageRequest.from_json(request.to_json()) == request


def test_request_json_carries_only_what_was_asked_for() -> None:
    assert json.loads(ImageRequest(task="edit", prompt="a cat").to_json()) == {"task": "edit", "prompt": "a cat"}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"task":"edit"}', b'{"task":"edit","prompt":"x","extra":1}', b"[" * 5000, b"\xff"]
)
def test_wrong_request_is_link_garbage(data: bytes) -> None:
    with pytest.raises(LinkGarbage):
        ImageRequest.from_json(data)


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_link_garbage(line: bytes) -> None:
    try:
        decode(line)
    except LinkGarbage:
        return
    pytest.fail("random bytes were taken for a message")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@given(messages, st.data())
def test_mutated_messages_raise_only_link_garbage_or_are_well_typed(message: Message, data: st.DataObject) -> None:
    values: dict[str, Any] = json.loads(encode(message))
    key = data.draw(st.sampled_from(sorted(values)))
    values[key] = data.draw(json_values)
    try:
        found = decode(json.dumps(values).encode())
    except LinkGarbage:
        return
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict[str, Any]": dict}
        assert isinstance(value, kinds[str(field.type)])
        if isinstance(value, int | float):
            assert math.isfinite(float(value))


@pytest.mark.parametrize(
    "line",
    [
        b"\x80\x04\x95",  # a pickle
        b"null",
        b"[]",
        b'"run"',
        b"{}",
        b'{"kind":"nothing"}',
        b'{"kind":["run"]}',
        b'{"kind":{}}',
        b'{"kind":"cancel"}',
        b'{"kind":"cancel","job":1}',
        b'{"kind":"cancel","job":"a","more":1}',
        b'{"kind":"ready","capacity":true,"engine":"x"}',
        b'{"kind":"beat","phase":"idle","allow_s":NaN}',
        b'{"kind":"beat","phase":"idle","allow_s":Infinity}',
        b'{"kind":"beat","phase":"idle","allow_s":1e999}',
        b'{"kind":"beat","phase":"idle","allow_s":1' + b"0" * 400 + b"}",
        b'{"kind":"need","job":"a","picture":0,"size":1' + b"0" * 40 + b"}",
        b"[" * 4000,
        b'{"a":' * 800,
        b"1" * 4095,
    ],
)
def test_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(LinkGarbage):
        decode(line)


def test_message_longer_than_a_pipe_takes_whole_is_a_bug_of_the_sender() -> None:
    with pytest.raises(ValueError, match="4096"):
        encode(Cancel("x" * MESSAGE_BYTES))


def test_message_of_exactly_the_limit_crosses(ends: tuple[Link, WorkerEnd]) -> None:
    link, end = ends
    room = MESSAGE_BYTES - len(encode(Cancel("")))
    link.send(Cancel("x" * room))
    assert end.receive() == Cancel("x" * room)
    end.send(Failed("x" * (MESSAGE_BYTES - len(encode(Failed("", {})))), {}))
    assert len(read_all(link)) == 1


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_line_beyond_the_limit_is_garbage_finished_or_not(ends: tuple[Link, WorkerEnd], tail: bytes) -> None:
    link, end = ends
    os.write(end.reports.fileno(), b" " * MESSAGE_BYTES + tail)
    with pytest.raises(LinkGarbage, match="4096"):
        read_all(link)


def test_messages_arrive_in_order_and_whole_whatever_the_split(ends: tuple[Link, WorkerEnd]) -> None:
    link, end = ends
    sent = [Progress("j", 0, step, 9) for step in range(9)]
    data = b"".join(encode(message) for message in sent)
    found = []
    for offset in range(0, len(data), 7):
        os.write(end.reports.fileno(), data[offset : offset + 7])
        found += link.receive()
    assert found == sent


def test_front_end_side_never_blocks(ends: tuple[Link, WorkerEnd]) -> None:
    link, end = ends
    assert link.receive() == []
    sent = [Cancel(f"{number:03} " + "x" * 1000) for number in range(200)]  # three pipes full, and nobody reads
    for message in sent:
        link.send(message)
    assert link.has_backlog
    found = []
    while len(found) < len(sent):
        found.append(end.receive())
        link.flush()
    assert found == sent
    assert not link.has_backlog


def test_worker_that_never_reads_is_given_up(ends: tuple[Link, WorkerEnd]) -> None:
    link, _ = ends

    def send_for_ever() -> None:
        while True:
            link.send(Stop())

    with pytest.raises(LinkClosed, match="not read"):
        send_for_ever()


def test_dead_worker_reads_as_end_of_file_after_its_last_words(ends: tuple[Link, WorkerEnd]) -> None:
    link, end = ends
    end.send(Heartbeat("idle"))
    end.close()
    assert link.receive() == [Heartbeat("idle")]
    with pytest.raises(LinkClosed):
        link.receive()
    with pytest.raises(LinkClosed):
        link.send(Stop())


def test_dead_front_end_reads_as_end_of_file_for_the_worker(ends: tuple[Link, WorkerEnd]) -> None:
    link, end = ends
    link.close()
    with pytest.raises(LinkClosed):
        end.receive()
    with pytest.raises(LinkClosed):
        end.send(Heartbeat("idle"))


def test_link_notes_beats_readiness_and_failure_and_leaves_jobs_to_who_checks_them(
    ends: tuple[Link, WorkerEnd],
) -> None:
    link, end = ends
    before = link.beat_at
    end.send(Ready(3, "toy", "because"))
    end.send(Heartbeat("denoise", 7.5))
    end.send(Done("j", 1, 2, 3))
    end.send(Failed("j2", {"message": "of a job"}))
    read_all(link)
    assert (link.phase, link.allow_s, link.jobs_done) == ("denoise", 7.5, 0)
    assert link.beat_at >= before
    assert link.ready == Ready(3, "toy", "because")
    assert link.failure is None
    end.send(Failed("", {"message": "of the worker"}))
    read_all(link)
    assert link.failure == Failed("", {"message": "of the worker"})


def test_readiness_ends_the_long_silence_of_loading(ends: tuple[Link, WorkerEnd]) -> None:
    link, end = ends
    end.send(Heartbeat("load", 500.0))
    end.send(Ready(1, "toy"))
    read_all(link)
    assert (link.phase, link.allow_s) == ("idle", 0.0)


@pytest.mark.parametrize("capacity", [0, -1, MAX_CAPACITY + 1])
def test_capacity_that_no_worker_has_is_garbage_and_not_noted(ends: tuple[Link, WorkerEnd], capacity: int) -> None:
    link, end = ends
    end.send(Ready(capacity, "toy"))
    with pytest.raises(LinkGarbage, match="capacity"):
        read_all(link)
    assert link.ready is None
    end.send(Ready(MAX_CAPACITY, "toy"))
    read_all(link)
    assert link.ready == Ready(MAX_CAPACITY, "toy")


def test_link_is_named_after_its_place_and_incarnation() -> None:
    link, end = open_link(CONTEXT, "toy", 2, 5)
    assert link.name == "toy/2#5"
    link.close()
    end.close()
