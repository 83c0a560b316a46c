"""A body in a segment: received in place, growing with what came, within its limit, given back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.dispatch.spool import Spool, open_blob
from ovserve.errors import ContentTooLarge, SpoolFull
from ovserve.front.spooled import SpooledForm, SpooledUpload, create_segment, receive
from tests.bodies import MemoryBody

MIB = 1 << 20


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 8 * MIB)
    yield spool
    spool.close()


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4096, 256 * 1024, 256 * 1024 + 1, 3 * MIB])
def test_all_of_a_body_is_received_in_order(spool: Spool, size: int, announced: bool) -> None:
    data = bytes(k % 251 for k in range(size))
    body = MemoryBody(data, announced=announced)
    segment = create_segment(body, spool, 4 * MIB)
    pieces = list(receive(body, segment, 4 * MIB))
    assert bytes(segment.view[:size]) == data
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])][: len(pieces)]
    assert not pieces or pieces[-1][1] == size
    segment.release()


def test_a_segment_grows_with_what_has_come_not_with_what_is_promised(spool: Spool) -> None:
    body = MemoryBody(b"x" * (7 * MIB), [1000] * 8000)
    segment = create_segment(body, spool, 8 * MIB)
    assert spool.used_bytes == 0
    most_ahead = 0
    for _, end in receive(body, segment, 8 * MIB):
        most_ahead = max(most_ahead, spool.used_bytes - end)
    assert most_ahead <= 256 * 1024
    assert spool.used_bytes == 7 * MIB
    segment.release()
    assert spool.used_bytes == 0


def test_a_body_at_its_limit_passes_and_one_byte_more_does_not(spool: Spool) -> None:
    for size, fits in ((1000, True), (1001, False)):
        body = MemoryBody(b"x" * size, announced=False)
        segment = create_segment(body, spool, 1000)
        if fits:
            assert sum(end - begin for begin, end in receive(body, segment, 1000)) == size
        else:
            with pytest.raises(ContentTooLarge, match="1000 bytes"):
                list(receive(body, segment, 1000))
        segment.release()


def test_a_full_spool_is_an_error_that_can_be_answered(spool: Spool) -> None:
    body = MemoryBody(b"x" * (9 * MIB))
    segment = create_segment(body, spool, 16 * MIB)
    with pytest.raises(SpoolFull):
        list(receive(body, segment, 16 * MIB))
    assert body.given <= 8 * MIB
    segment.release()
    assert spool.used_bytes == 0


def test_an_upload_is_a_place_in_the_segment_that_workers_can_open(spool: Spool) -> None:
    form = SpooledForm(is_json=False)
    segment = form.own(spool.store(b"head|picture|tail"))
    upload = SpooledUpload("image", "cat.png", segment, 5, 7)
    assert bytes(upload.view()) == b"picture"
    with open_blob(upload.blob) as seen:
        assert bytes(seen) == b"picture"
    form.release()
    with pytest.raises(FileNotFoundError), open_blob(upload.blob):
        pass


def test_releasing_a_form_twice_gives_its_bytes_back_once(spool: Spool) -> None:
    form = SpooledForm(is_json=True)
    form.own(spool.store(b"x" * 1000))
    form.own(spool.store(b"y" * 500))
    assert spool.used_bytes == 1500
    form.release()
    form.release()
    assert spool.used_bytes == 0
    assert [path.name for path in spool.directory.iterdir()] == ["lock"]
