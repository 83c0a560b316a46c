"""The most important faults with the real engine and the built-in model."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.chaos import run_chaos
from tests.faultserver import FaultServer, gone, picture_of
from tests.live import is_alive
from tests.rawclient import RawClient

PROMPT = "a green circle on a blue background"
MAX_STEPS = "100"  # the limit; takes seconds with the built-in model


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    limits = ("--hang_limit_s", "4", "--idle_hang_limit_s", "4")
    # The same threads and streams for every incarnation, so that a seed always gives the same bits; also starts faster.
    tuning = ("--replicas", "2", "--threads", "1", "--streams", "2", "--max_batch", "4")
    with FaultServer(tmp_path_factory.mktemp("spool"), *limits, *tuning, real=True) as server:
        yield server
        assert server.stop() == 0
        assert not server.logged("Traceback")


@pytest.fixture
def client(live: FaultServer) -> Iterator[httpx.Client]:
    live.until(lambda: live.model_status()["workers"] == 2, patience_s=60)
    before = live.resources()
    with live.client(timeout_s=120) as made:
        yield made
    live.until(lambda: live.model_status()["workers"] == 2, patience_s=60)
    live.until_released(before)
    live.until(lambda: live.segments() == [])


def edit(client: httpx.Client, data: Path, seed: int = 1, **fields: str) -> httpx.Response:
    with (data / "red_circle.png").open("rb") as image:
        known = {"prompt": PROMPT, "strength": "0.7", "seed": str(seed), **fields}
        return client.post("/v3/images/edits", data=known, files={"image": image})


def start_edit(client: httpx.Client, data: Path, replies: list[httpx.Response], **fields: str) -> threading.Thread:
    thread = threading.Thread(target=lambda: replies.append(edit(client, data, **fields)))
    thread.start()
    return thread


def test_job_of_a_killed_worker_gives_the_identical_picture(
    live: FaultServer, client: httpx.Client, data: Path
) -> None:
    undisturbed = picture_of(edit(client, data, num_inference_steps=MAX_STEPS))
    replies: list[httpx.Response] = []
    asking = start_edit(client, data, replies, num_inference_steps=MAX_STEPS)
    live.until(lambda: live.model_status()["running"] == 1)
    before = len(live.logged("worker died with a job; job requeued"))
    while asking.is_alive() and len(live.logged("worker died with a job; job requeued")) == before:
        live.until(lambda: len(live.workers()) == 2)
        live.kill_worker(live.workers()[0])  # sooner or later it is the one with the job
        asking.join(0.1)
    asking.join()
    assert picture_of(replies[0]) == undisturbed


def test_worker_stopped_during_a_job_is_replaced_and_the_job_done(
    live: FaultServer, client: httpx.Client, data: Path
) -> None:
    stopped = live.workers()
    replies: list[httpx.Response] = []
    asking = start_edit(client, data, replies, num_inference_steps=MAX_STEPS)
    live.until(lambda: live.model_status()["running"] == 1)
    for pid in stopped:
        live.kill_worker(pid, signal.SIGSTOP)
    asking.join()
    assert replies[0].status_code == 200
    live.until(lambda: all(gone(pid) for pid in stopped))


def test_clients_that_disconnect_free_the_device(live: FaultServer, client: httpx.Client, data: Path) -> None:
    started = time.monotonic()
    edit(client, data, num_inference_steps=MAX_STEPS)
    one_job_s = time.monotonic() - started
    content = (data / "red_circle.png").read_bytes()
    boundary = b"fault"
    fields = {"prompt": PROMPT, "strength": "0.9", "num_inference_steps": MAX_STEPS, "n": "4"}
    parts = b"".join(
        b'--fault\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value.encode())
        for name, value in fields.items()
    )
    body = parts + b'--fault\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + content
    body += b"\r\n--fault--\r\n"
    head = (
        b"POST /v3/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=" + boundary
    )
    request = head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for number in range(40):
        disconnecting = RawClient(live.port).send(request)
        time.sleep(0.002 * (number % 20))  # no wait for a condition: the test varies the moment of the disconnect
        disconnecting.abandon()
    disconnected_at = time.monotonic()
    live.until(lambda: live.model_status()["queued"] == live.model_status()["running"] == 0)
    # Forty times four pictures were requested; after the last disconnect only a few steps remain, less than one job.
    assert time.monotonic() - disconnected_at < max(5.0, 4 * one_job_s)
    assert edit(client, data).status_code == 200


def test_short_chaos(live: FaultServer, client: httpx.Client, data: Path) -> None:
    found = run_chaos(live, data / "red_circle.png", clients=4, seconds=9, every_s=1.5, seed=7)
    found.check()
    assert found.kills >= 1
    assert found.statuses[200] >= 1


def test_kills_while_loading_and_warming_up_then_a_drain_under_load(tmp_path: Path, data: Path) -> None:
    with FaultServer(tmp_path, "--log_level", "debug", real=True, wait_ready=False) as server:
        server.until(lambda: bool(server.logged("worker phase changed", "/0#0", "phase=load")))
        first = server.kill_worker()
        server.until(lambda: bool(server.logged("worker phase changed", "/0#1", "phase=warm-up")))
        second = server.kill_worker()
        server.await_ready()
        assert gone(first)
        assert gone(second)
        died = server.logged("worker died", "SIGKILL")
        assert [f"pid={pid} " in line for pid, line in zip((first, second), died, strict=True)] == [True, True]
        server.until(lambda: bool(server.logged("worker ready")))  # the line follows that of standard output
        [ready] = server.logged("worker ready")
        assert "/0#2" in ready  # the killed ones were never ready
        with server.client(timeout_s=120) as client:
            replies: list[httpx.Response] = []
            threads = [start_edit(client, data, replies, num_inference_steps=MAX_STEPS) for _ in range(5)]
            server.until(lambda: _accepted(server) == 5)
            [worker] = server.workers()
            server.signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            assert server.wait() == 0
        assert [reply.status_code for reply in replies] == [200] * 5
        assert not is_alive(worker)
    assert list(tmp_path.iterdir()) == []


def _accepted(server: FaultServer) -> int:
    status = server.model_status()
    return int(status["running"] + status["queued"])
