"""Overload of ten times the capacity: only 200 and 429, bounded waits, constant memory, health requests answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer
from tests.live import resident_bytes

JOB_S, CAPACITY, QUEUE = 0.05, 2, 8
CLIENTS = 10 * (CAPACITY + QUEUE)
SECONDS = 4.0


@pytest.fixture
def live(tmp_path: Path) -> Iterator[FaultServer]:
    with FaultServer(tmp_path, "--queue_limit", str(QUEUE), "--log_level", "warning") as server:
        yield server


def test_overload_is_answered_with_200_and_429_only(live: FaultServer) -> None:
    statuses: Counter[int] = Counter()
    waits: list[float] = []
    until = time.monotonic() + SECONDS
    start_bytes = 0

    def flood(client: httpx.Client) -> None:
        while time.monotonic() < until:
            reply = live.generate(client, f"sleep {JOB_S}")
            statuses[reply.status_code] += 1
            if reply.status_code == 429:
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                assert reply.headers["x-should-retry"] == "true"
                assert reply.json()["error"]["code"] == "queue_full"
                threading.Event().wait(0.1)  # a tenth of the smallest Retry-After: still an overload
            else:
                waits.append(float(reply.headers["server-timing"].split("queue;dur=")[1].split(",")[0]) / 1000)

    with live.client() as client, live.client() as prober:
        threads = [threading.Thread(target=flood, args=(client,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            assert prober.get("/v2/health/live").status_code == 200
            assert prober.get("/v2/health/ready").status_code == 200
            if not start_bytes and time.monotonic() > until - SECONDS / 2:
                start_bytes = resident_bytes(live.process.pid)
        for thread in threads:
            thread.join()
        growth_bytes = resident_bytes(live.process.pid) - start_bytes
    assert set(statuses) == {200, 429}
    assert statuses[429] > statuses[200]
    assert statuses[200] > 0.5 * SECONDS / JOB_S * CAPACITY
    # A job waits for those before it: queue length / capacity times the job's duration. Twice that for a busy machine.
    assert max(waits) < 2 * QUEUE / CAPACITY * JOB_S + 1.0
    assert growth_bytes < 16 << 20
    live.until(lambda: live.model_status()["running"] == live.model_status()["queued"] == 0)
    live.until(lambda: live.segments() == [])


@pytest.mark.parametrize("greedy_rotates", [False, True])
def test_jobs_of_one_client_do_not_block_another(tmp_path: Path, greedy_rotates: bool) -> None:
    """The other client has another key at the same address, or another address while the first rotates its keys."""
    transport = httpx.HTTPTransport(local_address="127.0.0.2" if greedy_rotates else "127.0.0.1")
    with (
        FaultServer(tmp_path, "--queue_limit", "64") as server,
        server.client() as client,
        httpx.Client(base_url=server.url, timeout=60, transport=transport) as other,
    ):

        def ask(key: str, prompt: str, statuses: list[int]) -> None:
            reply = (other if key == "modest" else client).post(
                "/v3/images/generations", json={"prompt": prompt}, headers={"authorization": f"Bearer {key}"}
            )
            statuses.append(reply.status_code)

        greedy: list[int] = []
        keys = [f"greedy{number if greedy_rotates else ''}" for number in range(80)]
        threads = [threading.Thread(target=ask, args=(key, "sleep 0.1", greedy)) for key in keys]
        for thread in threads:
            thread.start()
        server.until(lambda: server.model_status()["queued"] >= 30)
        modest: list[int] = []
        started = time.monotonic()
        ask("modest", "echo", modest)
        took_s = time.monotonic() - started
        for thread in threads:
            thread.join()
        assert modest == [200]
        assert took_s < 1.5  # in queue order it would wait for thirty jobs of 0.1 s at a capacity of two
        assert set(greedy) <= {200, 429}
