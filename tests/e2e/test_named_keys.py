"""Named keys with the real program: pictures a minute, models, revocation."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

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
        LiveServer("--named_keys_file", str(path)) as server,
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
        server.signal(signal.SIGHUP)
        started = time.monotonic()
        while ask(design, 1).status_code != 401:
            assert time.monotonic() - started < 20
        assert design not in "\n".join(server.log)


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
