"""Clients that read large results slowly hold spool space, not memory of the front end, and only until they leave."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faultserver import FaultServer
from tests.rawclient import RawClient
from tests.toys import bytes_of

SIZE = 8 << 20
PICTURES = 2
READERS = 4
# 4 clients hold 256 KiB each. Encoded whole, their results are 85 MiB.
BOUND_BYTES = 12 << 20


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    store = tmp_path_factory.mktemp("store")
    spool = tmp_path_factory.mktemp("spool")
    with FaultServer(spool, "--store_dir", str(store), "--log_level", "warning") as server, server.client() as client:
        # Starts what the first large result starts: a thread that allocates segments.
        assert server.generate(client, f"bytes {SIZE}").status_code == 200
        yield server


def post(**fields: object) -> bytes:
    content = json.dumps({"prompt": f"bytes {SIZE}", "n": PICTURES, "seed": 7, **fields}).encode()
    head = "POST /v3/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


def peak_of(pid: int) -> Callable[[], int]:
    """Reset the peak of resident memory (proc(5), clear_refs); return a function that returns its growth in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = _status_bytes(pid, "VmRSS")
    return lambda: _status_bytes(pid, "VmHWM") - before


def _status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def slow_reader(stack: ExitStack, live: FaultServer, request: bytes) -> RawClient:
    return stack.enter_context(RawClient(live.port, receive_buffer=65536)).send(request)


def read_json(client: RawClient, fields: dict[str, str]) -> list[bytes]:
    document = json.loads(client.read_exactly(int(fields["content-length"])))
    return [base64.b64decode(each["b64_json"]) for each in document["data"]]


def read_events(client: RawClient, _: dict[str, str]) -> list[bytes]:
    lines = b"".join(iter(client.read_chunk, b"")).split(b"\n")
    documents = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
    return [base64.b64decode(each["b64_json"]) for each in documents]


@pytest.mark.parametrize(
    ("fields", "read", "copies"),
    [({}, read_json, 1), ({"stream": True, "partial_images": 1}, read_events, 2)],
    ids=["json", "stream"],
)
def test_slow_readers_do_not_fill_the_memory(
    live: FaultServer,
    fields: dict[str, object],
    read: Callable[[RawClient, dict[str, str]], list[bytes]],
    copies: int,
) -> None:
    expected = sorted([bytes_of(7 + picture, SIZE) for picture in range(PICTURES)] * copies)
    with ExitStack() as stack:
        before = live.resources()
        growth = peak_of(live.process.pid)
        readers = [slow_reader(stack, live, post(**fields)) for _ in range(READERS)]
        heads = [reader.read_head() for reader in readers]
        live.until(lambda: live.model_status()["running"] == live.model_status()["queued"] == 0)
        assert len(live.segments()) >= READERS * PICTURES * copies
        assert growth() < BOUND_BYTES
        for reader, (status, head) in zip(readers, heads, strict=True):
            assert status == 200
            assert sorted(read(reader, head)) == expected
        assert growth() < BOUND_BYTES
        for reader in readers:
            reader.close()
        live.until_released(before)
    assert not live.logged("Traceback")


@pytest.mark.parametrize("leave", ["close", "abandon"])
@pytest.mark.parametrize("stream", [False, True])
def test_reader_that_leaves_releases_the_segments(live: FaultServer, stream: bool, leave: str) -> None:
    before = live.resources()
    with ExitStack() as stack:
        readers = [slow_reader(stack, live, post(stream=stream)) for _ in range(READERS)]
        for reader in readers:
            assert reader.read_head()[0] == 200
        live.until(lambda: len(live.segments()) >= READERS * PICTURES)
        for reader in readers:
            getattr(reader, leave)()
    live.until_released(before)
    live.until(lambda: live.segments() == [])


def test_slow_readers_of_a_stored_picture_do_not_fill_the_memory(live: FaultServer) -> None:
    with ExitStack() as stack, live.client() as client:
        reply = live.generate(client, f"bytes {SIZE}", n=1, seed=9, response_format="url")
        path = reply.json()["data"][0]["url"].removeprefix(live.url)
        live.until(lambda: live.segments() == [])
        before = live.resources()
        growth = peak_of(live.process.pid)
        get = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        readers = [slow_reader(stack, live, get) for _ in range(2 * READERS)]
        heads = [reader.read_head() for reader in readers]
        assert growth() < BOUND_BYTES
        expected = bytes_of(9, SIZE)
        for reader, (status, fields) in zip(readers[1:], heads[1:], strict=True):
            assert (status, fields["content-length"]) == (200, str(SIZE))
            assert reader.read_exactly(SIZE) == expected
        readers[0].abandon()
        for reader in readers[1:]:
            reader.close()
        live.until_released(before)


def test_drain_waits_for_a_reader_and_ends_with_the_grace_period(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--grace_period_s", "2") as live, ExitStack() as stack:
        reads, stalls = (slow_reader(stack, live, post()) for _ in range(2))
        _, fields = reads.read_head()
        stalls.read_head()
        live.signal(signal.SIGTERM)
        live.until(lambda: bool(live.logged("draining")))
        assert read_json(reads, fields) == [bytes_of(7 + picture, SIZE) for picture in range(PICTURES)]
        assert live.wait() == 0
        assert live.logged("requests aborted at the end of the grace period", "number=1")
        assert not live.logged("Traceback")
        assert list(tmp_path.iterdir()) == []
