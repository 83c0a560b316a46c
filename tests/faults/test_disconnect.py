"""Clients that disconnect: their jobs end, in the queue at once and in the worker at its next step."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faultserver import FaultServer
from tests.rawclient import RawClient

STEP_S = 0.02


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    with FaultServer(tmp_path_factory.mktemp("spool"), "--replicas", "2", "--log_level", "warning") as server:
        server.until(lambda: server.model_status()["workers"] == 2)
        yield server


def request(prompt: str, **fields: object) -> bytes:
    content = json.dumps({"prompt": prompt, **fields}).encode()
    head = "POST /v3/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


def until_idle(live: FaultServer) -> float:
    """Wait until no job is queued or running; return the seconds it took."""
    started = time.monotonic()
    live.until(lambda: live.model_status()["queued"] == live.model_status()["running"] == 0)
    return time.monotonic() - started


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leave", ["close", "abandon", "half_close"])
def test_client_that_leaves_a_running_job_stops_it(live: FaultServer, leave: str, stream: bool) -> None:
    client = RawClient(live.port).send(request("steps 500 0.02", stream=stream))
    live.until(lambda: live.model_status()["running"] == 1)
    getattr(client, leave)()
    assert until_idle(live) < 2.0  # the job would run for ten seconds
    client.close()


def test_client_that_leaves_removes_its_queued_job_at_once(live: FaultServer) -> None:
    running = [RawClient(live.port).send(request("steps 40 0.05")) for _ in range(4)]
    live.until(lambda: live.model_status()["running"] == 4)
    waiting = RawClient(live.port).send(request("echo never"))
    live.until(lambda: live.model_status()["queued"] == 1)
    waiting.abandon()
    live.until(lambda: live.model_status()["queued"] == 0, patience_s=1.5)
    assert live.model_status()["running"] == 4
    assert [client.read_response().status for client in running] == [200] * 4
    for client in running:
        client.close()


def test_five_hundred_disconnects_under_load_do_not_leak(live: FaultServer) -> None:
    before = live.resources()
    chance = random.Random(20)
    delays = [chance.random() * 0.12 for _ in range(500)]
    lock = threading.Lock()
    answered: list[int] = []

    def connect_and_leave() -> None:
        while True:
            with lock:
                if not delays:
                    return
                delay = delays.pop()
            client = RawClient(live.port).send(request("steps 4 0.02", stream=delay > 0.06, partial_images=0))
            time.sleep(delay)  # the delay is what varies: there is no event to wait for
            client.abandon() if int(delay * 1e6) % 2 else client.close()

    def stay_connected() -> None:
        while delays:
            with RawClient(live.port) as client:
                answered.append(client.send(request("steps 2 0.02")).read_response().status)

    threads = [threading.Thread(target=connect_and_leave) for _ in range(16)] + [
        threading.Thread(target=stay_connected)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert until_idle(live) < 2.0
    live.until_released(before)
    live.until(lambda: live.segments() == [])
    assert set(answered) <= {200, 429}
    assert 200 in answered
    assert not live.logged("Traceback")
    assert not live.logged("worker died")
