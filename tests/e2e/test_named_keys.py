"""Named keys with the real program: pictures a minute, models, revocation."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer
from tests.live import LiveServer


def add(path: Path, *arguments: str) -> str:
    """Add a key with the command, as an operator does; return it."""
    command = [sys.executable, "-m", "ovserve", "key", "add", *arguments, "--file", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_limits_and_revocation(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    design = add(path, "design", "--pictures_per_minute", "3")
    foreign = add(path, "foreign", "--models", "another")
    with (
        LiveServer("--named_keys_file", str(path), "--admin_key", "operator") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def ask(key: str, count: int) -> httpx.Response:
            fields = {"prompt": "a", "n": count, "size": "64x64", "steps": 1}
            return client.post("/v1/images/generations", json=fields, headers={"Authorization": f"Bearer {key}"})

        assert ask(design, 4).status_code == 403
        done = ask(design, 2)
        assert (done.status_code, len(done.json()["data"])) == (200, 2)
        assert done.headers["x-ratelimit-remaining-images"] == "1"
        refused = ask(design, 2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert ask(design, 1).status_code == 200
        assert ask(foreign, 1).status_code == 403
        assert client.get("/v1/models").status_code == 401
        assert any("key_name=design" in line for line in list(server.log)), server.log
        path.write_text("[[key]]" + path.read_text().split("[[key]]")[2])
        operator = {"Authorization": "Bearer operator"}
        assert client.post("/v1/config/reload", headers=operator).status_code == 200
        assert ask(design, 1).status_code == 401, "the first request after the reload"
        assert design not in "\n".join(server.log)


@pytest.mark.heavy  # more than a minute
def test_a_minute_has_exactly_the_requests_of_the_limit(tmp_path: Path) -> None:
    limit, clients, minute_s, seen_s = 25, 4, 60.0, 64.0
    path = tmp_path / "keys.toml"
    key = add(path, "team", "--requests_per_minute", str(limit))
    accepted: list[tuple[float, float]] = []  # when each was sent, and when its answer had come
    waits: list[int] = []
    with LiveServer("--named_keys_file", str(path)) as server:
        began = time.monotonic()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as client:
                while (sent_at := time.monotonic()) < began + seen_s:
                    reply = client.get("/v1/models")
                    if reply.status_code == 200:
                        accepted.append((sent_at, time.monotonic()))
                    else:
                        assert reply.status_code == 429
                        waits.append(int(reply.headers["retry-after"]))

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    accepted.sort()
    first = [sent_at for sent_at, _ in accepted if sent_at < accepted[0][1] + minute_s - 1]
    assert len(first) == limit, "in the first minute"
    assert len(accepted) == 2 * limit, "with those that were free again after it"
    # No 60 seconds contain more: request k + limit was counted at least a minute after request k.
    for (sent_at, _), (_, answered_at) in zip(accepted, accepted[limit:], strict=False):
        assert answered_at - sent_at >= minute_s
    assert max(waits) <= minute_s
    print(f"{len(accepted)} accepted and {len(waits)} refused in {seen_s:.0f} s, limit {limit} a minute")


def test_turns_are_fair_between_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    busy, calm = add(path, "busy"), add(path, "calm")
    finished: list[str] = []
    with (
        FaultServer(tmp_path, "--named_keys_file", str(path), toy_options={"capacity": 1}) as server,
        server.client() as client,
    ):

        def ask(key: str, name: str) -> None:
            headers = {"Authorization": f"Bearer {key}"}
            reply = client.post("/v1/images/generations", json={"prompt": "sleep 0.2"}, headers=headers)
            assert reply.status_code == 200
            finished.append(name)

        def unfinished() -> int:
            """Return how many jobs wait or are on the worker, which may take one more than it runs."""
            listed = client.get("/v1/models", headers={"Authorization": f"Bearer {calm}"}).json()["data"][0]
            return int(listed["queued"]) + int(listed["running"])

        # A job holds the worker until all others wait.
        with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as first:
            body = json.dumps({"prompt": "steps 1000 0.05"})
            fields = {"Authorization": f"Bearer {busy}", "Content-Type": "application/json"}
            first.request("POST", "/v1/images/generations", body, fields)
            server.until(lambda: unfinished() == 1)
            jobs = [threading.Thread(target=ask, args=(busy, "busy")) for _ in range(12)]
            for job in jobs:
                job.start()
            server.until(lambda: unfinished() == 13)
            jobs.append(threading.Thread(target=ask, args=(calm, "calm")))
            jobs[-1].start()
            server.until(lambda: unfinished() == 14)
        for job in jobs:
            job.join()
    assert finished.index("calm") < 4, finished  # all clients have one address: only the key tells them apart


def test_keys_are_rotated_under_load_without_a_failed_request(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    kept, first = add(path, "kept", "--concurrent", "8"), add(path, "first")
    statuses: list[int] = []
    ending = threading.Event()
    with LiveServer("--named_keys_file", str(path)) as server:

        def load() -> None:
            with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {kept}"}) as client:
                while not ending.is_set():
                    statuses.append(client.get("/v1/models").status_code)

        def status_of(key: str) -> int:
            return httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert status_of(first) == 200
        second = add(path, "second")
        tables = path.read_text().split("[[key]]")
        path.write_text("[[key]]".join([tables[0], tables[1], tables[3]]))
        server.signal(signal.SIGHUP)
        until = time.monotonic() + 20
        while status_of(first) != 401 or status_of(second) != 200:
            assert time.monotonic() < until
        ending.set()
        for thread in threads:
            thread.join()
    assert statuses
    assert set(statuses) == {200}
