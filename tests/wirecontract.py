"""What every implementation of the process boundary must do. Collected by the tests of each implementation.

Those define the fixtures `ends`, the two sides of a link, and `stores`, a BlobStore and the access of a worker to it.
"""

from __future__ import annotations

import select
import threading

import pytest

from ovserve.errors import BlobGone, ContentTooLarge, LinkClosed, LinkGarbage, SpoolFull
from ovserve.wire.blobs import Blob, BlobStore, WorkerBlobs
from ovserve.wire.link import MAX_CAPACITY, Link, WorkerLink
from ovserve.wire.messages import Cancel, Done, Failed, Heartbeat, Message, Progress, Ready, Stop

LIMIT_BYTES = 4 << 20
PATIENCE_S = 30.0
Ends = tuple[Link, WorkerLink]
Stores = tuple[BlobStore, WorkerBlobs]


def is_ready(link: Link) -> bool:
    return bool(select.select([link.readiness], [], [], 0)[0])


def becomes_ready(link: Link) -> bool:
    return bool(select.select([link.readiness], [], [], PATIENCE_S)[0])


def receive(link: Link, count: int) -> list[Message]:
    """Return this many reports; on a cluster they do not arrive at once."""
    messages: list[Message] = []
    while len(messages) < count:
        assert becomes_ready(link), f"{messages} and no more"
        messages += link.receive()
    return messages


# --- links ---


def test_messages_arrive_in_order_in_both_directions(ends: Ends) -> None:
    link, end = ends
    for step in range(5):
        link.send(Cancel(str(step)))
        end.send(Progress("j", 0, step, 5))
    assert [end.receive() for _ in range(5)] == [Cancel(str(step)) for step in range(5)]
    assert receive(link, 5) == [Progress("j", 0, step, 5) for step in range(5)]


def test_readiness_follows_the_reports(ends: Ends) -> None:
    link, end = ends
    assert not is_ready(link)
    assert link.receive() == []
    end.send(Heartbeat("idle"))
    assert becomes_ready(link)
    receive(link, 1)
    assert not is_ready(link)


def test_name_has_model_slot_and_incarnation(ends: Ends) -> None:
    assert ends[0].name == "toy/2#3"


def test_position_tells_which_commands_the_worker_has_taken(ends: Ends) -> None:
    link, end = ends
    positions = []
    for number in range(3):
        positions.append(link.sent)
        link.send(Cancel(str(number)))
    assert positions[0] <= link.consumed <= link.sent
    end.receive()
    assert positions[1] <= link.consumed <= link.sent  # a reader may take more than it returns


def test_last_reports_of_a_dead_worker_come_before_the_end(ends: Ends) -> None:
    link, end = ends
    end.send(Done("j", 1.0, 2.0, 3.0))
    end.close()
    assert receive(link, 1) == [Done("j", 1.0, 2.0, 3.0)]
    assert becomes_ready(link)
    with pytest.raises(LinkClosed):
        link.receive()
    with pytest.raises(LinkClosed):
        link.send(Stop())


def test_closed_front_end_ends_a_waiting_worker(ends: Ends) -> None:
    link, end = ends
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(LinkClosed):
            end.receive()
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    link.close()
    link.close()
    assert ended.wait(PATIENCE_S)
    thread.join()


def test_worker_that_never_reads_is_clogged_at_a_limit(ends: Ends) -> None:
    link, _ = ends

    def send_forever() -> None:
        while True:
            link.send(Stop())

    with pytest.raises(LinkClosed, match="does not read"):
        send_forever()
    assert link.state.is_clogged


def test_state_is_replaced_as_a_whole(ends: Ends) -> None:
    link, end = ends
    before = link.state
    end.send(Ready(3, "toy"))
    end.send(Heartbeat("denoise", 7.5))
    end.send(Failed("", {"message": "why"}))
    receive(link, 3)
    assert before.ready is None
    state = link.state
    assert (state.ready, state.phase, state.allow_s) == (Ready(3, "toy"), "denoise", 7.5)
    assert state.failure == Failed("", {"message": "why"})


@pytest.mark.parametrize("capacity", [0, MAX_CAPACITY + 1])
def test_impossible_capacity_is_a_protocol_violation(ends: Ends, capacity: int) -> None:
    link, end = ends
    end.send(Ready(capacity, "toy"))
    assert becomes_ready(link)
    with pytest.raises((LinkGarbage, LinkClosed)):  # on a cluster, the node finds out
        link.receive()
    assert link.state.ready is None


def test_updates_of_two_threads_are_not_lost(ends: Ends) -> None:
    link, _ = ends

    def count(name: str) -> None:
        for number in range(1, 2001):
            link.update(**{name: number})

    threads = [threading.Thread(target=count, args=(name,)) for name in ("jobs_done", "jobs_lost")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (link.state.jobs_done, link.state.jobs_lost) == (2000, 2000)


# --- blobs ---


def test_request_travels_by_its_id(stores: Stores) -> None:
    store, worker = stores
    segment = store.put(b"a request")
    assert worker.read(segment.id) == b"a request"
    segment.release()


def test_upload_travels_as_a_blob(stores: Stores) -> None:
    store, worker = stores
    segment = store.create_for_upload(100)
    segment.reserve(20)
    segment.view[:20] = bytes(range(20))
    with worker.open(segment.blob(5, 10)) as seen:
        assert bytes(seen) == bytes(range(5, 15))
    segment.release()


def test_client_within_its_share_gets_the_space_of_one_above_it(stores: Stores) -> None:
    store, _ = stores
    segments = []
    for number in range(4):
        holding = store.account.open("hostile", lambda number=number: segments[number].release())  # type: ignore[misc]
        segments.append(store.create_for_upload(1 << 20, holding=holding))
        segments[-1].reserve(1 << 20)
    own = store.account.open("innocent")
    request, result = store.put(b"x" * 1000, own), store.create(1 << 20, 1 << 20, own)
    assert store.account.held_by("innocent") == 1000 + (1 << 20)
    assert store.account.held_by("hostile") == 2 << 20
    refused = store.create_for_upload(2 << 20, holding=store.account.open("hostile"))
    with pytest.raises(SpoolFull):
        refused.reserve(2 << 20)
    for segment in (*segments, request, result, refused):
        segment.release()
    assert store.used_bytes == store.account.used == 0


def test_result_is_filled_by_the_worker(stores: Stores) -> None:
    store, worker = stores
    segment = store.create(10, reserve=10)
    worker.fill(segment.id, b"0123456789")
    assert bytes(segment.view[:10]) == b"0123456789"
    segment.release()


def test_released_storage_is_gone_for_workers(stores: Stores) -> None:
    store, worker = stores
    segment = store.put(b"gone")
    blob = segment.blob(0, 4)
    segment.release()
    segment.release()
    with pytest.raises(BlobGone):
        worker.read(blob.id)
    with pytest.raises(BlobGone):
        worker.fill(blob.id, b"late")
    with pytest.raises(BlobGone), worker.open(blob):
        pass


@pytest.mark.parametrize("name", ["", "unknown", "../lock", "lock", "/etc/passwd", "0" * 24, "a" * 10_000])
def test_unknown_id_is_gone(stores: Stores, name: str) -> None:
    _, worker = stores
    with pytest.raises(BlobGone):
        worker.read(name)
    with pytest.raises(BlobGone), worker.open(Blob(name, 0, 1)):
        pass


def test_bytes_are_accounted_up_to_the_limit(stores: Stores) -> None:
    store, _ = stores
    half = store.create(LIMIT_BYTES // 2, reserve=LIMIT_BYTES // 2)
    assert store.used_bytes == LIMIT_BYTES // 2
    with pytest.raises(SpoolFull):
        store.create(LIMIT_BYTES, reserve=LIMIT_BYTES // 2 + 1)
    assert store.used_bytes == LIMIT_BYTES // 2
    half.release()
    assert store.used_bytes == 0
    store.check_size(store.capacity_bytes)
    with pytest.raises(ContentTooLarge):
        store.check_size(store.capacity_bytes + 1)


def test_released_segment_has_no_view(stores: Stores) -> None:
    store, _ = stores
    segment = store.put(b"x")
    segment.release()
    with pytest.raises(ValueError, match="released"):
        segment.view  # noqa: B018
