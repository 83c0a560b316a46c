"""Replies with pictures: the JSON document and the events, whatever the sizes of the pictures."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovserve.api.exchange import JsonReply, ServerEvent, windows_of
from ovserve.api.replies import completed_event, images_reply, partial_event
from ovserve.api.windows import WINDOW_BYTES
from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job, Partial, Result
from ovserve.front.http1.events import encode_event, event
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import Prepared
from tests.forms import edit

PREPARED = Prepared("j", "image2image", 64, 48, 1, 5, 7, 24)
SOURCE = random.Random(15).randbytes(WINDOW_BYTES + 8)
EDGE = WINDOW_BYTES // 4 * 3
SIZES = st.lists(st.integers(1, 7) | st.integers(EDGE - 3, EDGE + 3), min_size=1, max_size=3)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 64 << 20)
    yield spool
    spool.close()


@contextmanager
def done_job(spool: Spool, sizes: list[int]) -> Iterator[Job]:
    """Yield a job with one result for each size. It is closed at the end of the block."""
    job = Job("j", "m", Client("a"), edit(("n", "3")).request, Deadline.after(60))
    try:
        for number, size in enumerate(sizes):
            segment = spool.put(SOURCE[:size])
            job.add_segment(segment)
            job.results[number] = Result(segment, size, 40 + number, number)
        yield job
    finally:
        job.close()


def content_of(reply: JsonReply) -> bytes:
    content = b"".join(windows_of(reply.chunks))
    assert len(content) == sum(map(len, reply.chunks))
    return content


def compact(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES)
def test_json_reply_contains_each_picture_whole(spool: Spool, sizes: list[int]) -> None:
    with done_job(spool, sizes) as job:
        content = content_of(images_reply(job, PREPARED, edit(("n", "3"))))
    document = json.loads(content)
    assert content == compact(document) + b"\n"
    assert list(document) == ["created", "model", "size", "quality", "background", "output_format", "data", "usage"]
    assert document["data"] == [
        {"b64_json": base64.b64encode(SOURCE[:size]).decode(), "seed": 40 + number} for number, size in enumerate(sizes)
    ]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES)
def test_events_contain_their_picture_whole(spool: Spool, sizes: list[int]) -> None:
    parameters = edit(("n", "3"))
    with done_job(spool, sizes) as job:
        for number, result in job.results.items():
            partial = Partial(number, 0, result.segment, result.size)
            expected = base64.b64encode(SOURCE[: result.size]).decode()
            for sent in (completed_event(result, PREPARED, parameters), partial_event(partial, PREPARED, parameters)):
                data = b"".join(windows_of(sent.data))
                document = json.loads(data)
                assert data == compact(document)
                assert list(document)[:2] == ["type", "b64_json"]
                assert (document["type"], document["b64_json"]) == (sent.kind, expected)
                assert encoded(sent) == event(sent.kind, data)


def encoded(sent: ServerEvent) -> bytes:
    chunks = encode_event(sent.kind, sent.data)
    block = b"".join(windows_of(chunks))
    assert len(block) == sum(map(len, chunks))
    return block


def test_reply_reads_the_segments_until_it_is_closed(spool: Spool) -> None:
    with done_job(spool, [100, 200]) as job:
        reply = images_reply(job, PREPARED, edit(("n", "3")))
        assert spool.used_bytes == 300
        first = content_of(reply)
        assert content_of(reply) == first
        reply.close()
        assert spool.used_bytes == 0
        with pytest.raises(ValueError, match="released"):
            content_of(reply)


def test_reply_with_urls_reads_no_segment(spool: Spool) -> None:
    with done_job(spool, [100]) as job:
        reply = images_reply(job, PREPARED, edit(), {0: "http://a.test/x.png"})
        job.close()
        assert json.loads(content_of(reply))["data"] == [{"url": "http://a.test/x.png", "seed": 40}]
