"""What proxies pass on: each event of a stream when it is sent, a disconnect, large uploads, 429 and 503.

Cancelled jobs and full queues are timed with toy workers, whose steps last as long as the prompt asks.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise

import httpx
import pytest

from tests.faultserver import TINY_PNG, FaultServer
from tests.live import BUILTIN_PATH
from tests.proxies import run_proxy

STEP_S = 0.4
SLACK_S = 1.0  # for a machine under other load
UPLOAD_BYTES = 200_000_000
CHUNK_BYTES = 1_000_000


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Start a server with a model that takes one job at a time and queues one, and a model that cannot be loaded."""
    folder = tmp_path_factory.mktemp("toys")
    models = {"toy": {"capacity": 1}, "broken": {"load": "fail no such device"}}
    text = "".join(
        f"[[model]]\nname = '{name}'\npath = '{BUILTIN_PATH}'\nqueue_limit = 1\n"
        f"plugin_config = '{json.dumps(options)}'\n"
        for name, options in models.items()
    )
    (folder / "c.toml").write_text(f"default_model = 'toy'\n{text}")
    with FaultServer(folder / "spool", "--config", str(folder / "c.toml")) as server:
        yield server


@pytest.fixture(scope="module", params=["nginx", "haproxy", "caddy"])
def proxied(
    request: pytest.FixtureRequest, toys: FaultServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Start a proxy in front of the server; yield the proxy's URL."""
    with run_proxy(request.param, tmp_path_factory.mktemp(request.param), toys.port) as url:
        yield url


def running(toys: FaultServer) -> int:
    """Return how many jobs are on the worker of the model `toy`."""
    return int(toys.fetch("/v3/models/toy")[1]["running"])


def test_each_event_of_a_stream_arrives_when_it_is_sent(proxied: str) -> None:
    document = {"prompt": f"steps 4 {STEP_S}", "stream": True}
    arrived = []
    with httpx.stream("POST", f"{proxied}/v1/images/generations", json=document, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line.startswith(": picture 1: step"):
                arrived.append(time.monotonic())
            if line.startswith("event: "):
                arrived.append(time.monotonic())
                assert line == "event: image_generation.completed"
    assert len(arrived) >= 4
    # Buffered events would arrive together at the end, delayed ones irregularly.
    assert all(after - before > 0.7 * STEP_S for before, after in pairwise(arrived[:4]))


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels_the_job_within_one_step(proxied: str, toys: FaultServer, stream: bool) -> None:
    document = {"prompt": f"steps 100 {STEP_S}", "stream": stream}
    client = httpx.Client(base_url=proxied, timeout=httpx.Timeout(60, read=3 * STEP_S))
    if stream:
        with client.stream("POST", "/v1/images/generations", json=document) as reply:
            lines = reply.iter_lines()  # kept: the connection is closed with it
            while not next(lines).startswith(": picture 1: step"):
                pass
            assert running(toys) == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/images/generations", json=document)
    client.close()
    left = time.monotonic()
    toys.until(lambda: running(toys) == 0)
    assert time.monotonic() - left < STEP_S + SLACK_S


def test_upload_of_200_mb_arrives_unchanged(proxied: str) -> None:
    padding = bytes(range(256)) * (CHUNK_BYTES // 256)
    chunks = UPLOAD_BYTES // len(padding)
    head = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\ncrc\r\n'
    head += b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + TINY_PNG
    checksum = zlib.crc32(TINY_PNG)
    for _ in range(chunks):
        checksum = zlib.crc32(padding, checksum)

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(chunks):
            yield padding
        yield b"\r\n--b--\r\n"

    size = len(head) + chunks * len(padding) + len(b"\r\n--b--\r\n")
    headers = {"content-type": "multipart/form-data; boundary=b", "content-length": str(size)}
    reply = httpx.post(f"{proxied}/v1/images/edits", content=body(), headers=headers, timeout=120)
    assert reply.status_code == 200, reply.text[:300]
    assert base64.b64decode(reply.json()["data"][0]["b64_json"])[-4:] == checksum.to_bytes(4, "big")


def test_full_queue_is_passed_on_as_429(proxied: str, toys: FaultServer) -> None:
    with ExitStack() as waiting:
        for state in ("running", "queued"):  # both jobs last until their connections are closed
            connection = waiting.enter_context(closing(http.client.HTTPConnection(proxied.removeprefix("http://"))))
            body = json.dumps({"prompt": f"steps 1000 {STEP_S}"})
            connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
            toys.until(lambda state=state: toys.fetch("/v3/models/toy")[1][state] == 1)  # type: ignore[misc]
        reply = httpx.post(f"{proxied}/v1/images/generations", json={"prompt": "echo"}, timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    toys.until(lambda: running(toys) == 0)
    assert httpx.post(f"{proxied}/v1/images/generations", json={"prompt": "echo"}, timeout=60).status_code == 200


def test_failed_model_is_passed_on_as_503(proxied: str) -> None:
    reply = httpx.post(f"{proxied}/v1/images/generations", json={"prompt": "echo", "model": "broken"}, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_failed")
    assert "no such device" in reply.json()["error"]["message"]
    assert 1 <= int(reply.headers["retry-after"]) <= 60
