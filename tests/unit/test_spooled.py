"""Tests of receiving a body into a segment: order, growth, limits, and release."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.errors import BlobGone, ContentTooLarge, RequestTimeout, SpoolFull
from ovserve.front.forms.spooled import SpooledForm, SpooledUpload, receive
from ovserve.wire.local.spool import Spool
from tests.bodies import MemoryBody

MIB = 1 << 20


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 8 * MIB)
    yield spool
    spool.close()


@pytest.fixture
def form() -> Iterator[SpooledForm]:
    form = SpooledForm(is_json=False)
    yield form
    form.release()


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4096, 16 * 1024, 16 * 1024 + 1, 256 * 1024, 256 * 1024 + 1, 3 * MIB])
def test_a_body_is_received_completely_and_in_order(
    spool: Spool, form: SpooledForm, size: int, announced: bool
) -> None:
    data = bytes(k % 251 for k in range(size))
    pieces = list(receive(MemoryBody(data, announced=announced), form, spool, 4 * MIB))
    assert b"".join(segment.view[begin:end] for segment, begin, end in pieces) == data
    assert [begin for _, begin, _ in pieces] == [0, *(end for _, _, end in pieces)][: len(pieces)]
    assert len({segment.id for segment, _, _ in pieces}) <= 1


class SlowBody(MemoryBody):
    """A body whose client sends nothing after the first read."""

    def readinto(self, view: memoryview, /) -> int:
        if self.given:
            raise RequestTimeout("too slow")
        return super().readinto(view)


def test_a_head_alone_reserves_nothing(spool: Spool, form: SpooledForm) -> None:
    body = SlowBody(b"x" * 7 * MIB)
    body.given = 1
    with pytest.raises(RequestTimeout):
        list(receive(body, form, spool, 8 * MIB))
    assert spool.used_bytes == 0
    assert [path.name for path in spool.directory.iterdir()] == ["lock"]


def test_a_segment_grows_with_the_received_bytes(spool: Spool, form: SpooledForm) -> None:
    body = MemoryBody(b"x" * (7 * MIB), [1000] * 8000)
    most_ahead = 0
    for _, _, end in receive(body, form, spool, 8 * MIB):
        most_ahead = max(most_ahead, spool.used_bytes - end)
        assert spool.used_bytes <= max(256 * 1024, 2 * end)
    assert most_ahead <= MIB
    assert spool.used_bytes == 7 * MIB
    form.release()
    assert spool.used_bytes == 0


def test_a_body_is_accepted_up_to_its_limit(spool: Spool, form: SpooledForm) -> None:
    for limit in (1000, 16 * 1024, 300_000):
        pieces = list(receive(MemoryBody(b"x" * limit, announced=False), form, spool, limit))
        assert pieces[-1][2] == limit
        with pytest.raises(ContentTooLarge, match=f"larger than {limit} bytes"):
            list(receive(MemoryBody(b"x" * (limit + 1), announced=False), form, spool, limit))


def test_a_full_spool_raises_spool_full(spool: Spool, form: SpooledForm) -> None:
    hog = spool.create(MIB, reserve=MIB)
    body = MemoryBody(b"x" * (8 * MIB))
    with pytest.raises(SpoolFull):
        list(receive(body, form, spool, 16 * MIB))
    assert body.given <= 7 * MIB
    form.release()
    assert spool.used_bytes == MIB
    hog.release()


def test_a_body_larger_than_the_spool_is_refused_before_it_takes_space(spool: Spool, form: SpooledForm) -> None:
    body = MemoryBody(b"x" * (8 * MIB + 1))
    with pytest.raises(ContentTooLarge, match=f"holds {8 * MIB}"):
        list(receive(body, form, spool, 16 * MIB))
    assert (body.given, spool.used_bytes) == (0, 0)
    unannounced = MemoryBody(b"x" * (16 * MIB), announced=False)
    with pytest.raises(ContentTooLarge, match=f"holds {8 * MIB}"):
        list(receive(unannounced, form, spool, 16 * MIB))


def test_the_blob_of_an_upload_can_be_opened(spool: Spool) -> None:
    form = SpooledForm(is_json=False)
    segment = form.own(spool.put(b"head|picture|tail"))
    upload = SpooledUpload("image", "cat.png", segment, 5, 7)
    assert bytes(upload.view()) == b"picture"
    with spool.worker_blobs().open(upload.blob) as seen:
        assert bytes(seen) == b"picture"
    form.release()
    with pytest.raises(BlobGone), spool.worker_blobs().open(upload.blob):
        pass


def test_releasing_a_form_is_idempotent(spool: Spool) -> None:
    form = SpooledForm(is_json=True)
    form.own(spool.put(b"x" * 1000))
    form.own(spool.put(b"y" * 500))
    assert spool.used_bytes == 1500
    form.release()
    form.release()
    assert spool.used_bytes == 0
    assert [path.name for path in spool.directory.iterdir()] == ["lock"]
