"""Workers that hang while busy, idle or in the middle of a message are replaced, and their jobs are done by others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer, gone, picture_of

LIMIT_S = 1.0
SLACK_S = 3.0  # for a busy machine; the target is the limit plus 2 s and the start of a process


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    limits = ("--hang_limit_s", str(LIMIT_S), "--idle_hang_limit_s", str(LIMIT_S), "--replicas", "2")
    with FaultServer(tmp_path_factory.mktemp("spool"), *limits) as server:
        yield server


@pytest.fixture
def client(live: FaultServer) -> Iterator[httpx.Client]:
    live.until(lambda: live.model_status()["workers"] == 2)
    with live.client() as made:
        yield made
    live.until(lambda: live.model_status()["workers"] == 2)
    live.until(lambda: live.segments() == [])


@pytest.mark.parametrize("command", ["hang", "partial"])
def test_job_of_a_hung_worker_is_done_by_another(
    live: FaultServer, client: httpx.Client, tmp_path: Path, command: str
) -> None:
    started = time.monotonic()
    reply = live.generate(client, f"once {tmp_path / 'hung'} {command}", seed=3)
    assert picture_of(reply) == f"once {tmp_path / 'hung'} {command}|3".encode()
    assert time.monotonic() - started < LIMIT_S + 2.0 + SLACK_S
    assert live.logged("worker killed", "hung: no heartbeat")


def test_job_that_hangs_two_workers_is_500_worker_crashed(live: FaultServer, client: httpx.Client) -> None:
    reply = live.generate(client, "hang")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "worker_crashed")


def test_stopped_worker_is_replaced_while_the_other_serves(live: FaultServer, client: httpx.Client) -> None:
    stopped = live.kill_worker(number=signal.SIGSTOP)
    served: list[int] = []

    def request_until_it_is_gone() -> None:
        while not gone(stopped):
            served.append(live.generate(client, "echo").status_code)

    threads = [threading.Thread(target=request_until_it_is_gone) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # At most as many requests as its capacity can have been dispatched to the stopped worker and waited for its end.
    assert len(served) > 20
    assert set(served) == {200}


def test_jobs_of_a_stopped_worker_are_done(live: FaultServer, client: httpx.Client) -> None:
    replies: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: replies.append(live.generate(client, "steps 20 0.05"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    live.until(lambda: live.model_status()["running"] == 4)
    live.kill_worker(number=signal.SIGSTOP)
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 6


def test_front_end_that_was_stopped_itself_kills_no_worker(live: FaultServer, client: httpx.Client) -> None:
    before = live.workers()
    os.kill(live.process.pid, signal.SIGSTOP)
    threading.Event().wait(2 * LIMIT_S)
    os.kill(live.process.pid, signal.SIGCONT)
    assert live.generate(client, "echo").status_code == 200
    assert live.workers() == before
