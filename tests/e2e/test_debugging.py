"""What shows an operator what the server does: jobs, and the level of the log; with the real program."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer

ADMIN = {"Authorization": "Bearer operator"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    options = ("--admin_key", "operator", "--log_format", "json", "--replicas", "2")
    with FaultServer(tmp_path_factory.mktemp("spool"), *options) as made:
        yield made


def entries(server: FaultServer) -> list[dict[str, object]]:
    """Return the log so far; each line is JSON."""
    return [json.loads(line) for line in list(server.log) if line.startswith("{")]


def await_that(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_jobs_are_listed_for_operators(server: FaultServer) -> None:
    with server.client() as client:
        assert client.get("/v1/debug/jobs").status_code == 403
        assert client.get("/debug/jobs").status_code == 403
        assert client.get("/debug/jobs", headers=ADMIN).json() == {"jobs": [], "left_out": 0}
        asking = threading.Thread(target=server.generate, args=(client, "sleep 2"))
        asking.start()

        seen: list[dict[str, object]] = []

        def running() -> list[dict[str, object]]:
            jobs = client.get("/v1/debug/jobs", headers=ADMIN).json()["jobs"]
            seen.extend(job for job in jobs if job["state"] == "running")
            return jobs

        await_that(lambda: bool(running()) and bool(seen))
        job = seen[-1]
        asking.join()
        assert (job["model"], job["client"], job["pictures"], job["attempts"]) == ("ovserve-builtin", "127.0.0.1", 1, 1)
        assert "/" in str(job["worker"])
        assert "prompt" not in str(job)
        assert 0 <= float(str(job["dispatched_s_ago"])) <= float(str(job["admitted_s_ago"]))
        await_that(lambda: not running())


def test_level_of_the_log_changes_at_run_time_in_all_processes(server: FaultServer) -> None:
    with server.client() as client:
        workers = server.workers()
        assert client.post("/v1/debug/log?level=debug").status_code == 403
        assert client.post("/v1/debug/log?level=loud", headers=ADMIN).status_code == 400
        changed = client.post("/v1/debug/log?level=error", headers=ADMIN)
        assert changed.json() == {"level": "error", "before": "info"}
        assert client.get("/v1/debug/log", headers=ADMIN).json() == {"level": "error"}
        silent = server.generate(client, "echo").headers["x-request-id"]
        server.signal(signal.SIGUSR1)  # a stack is a warning
        # A reload applies the level of the settings again, without new workers.
        assert client.post("/v1/config/reload", headers=ADMIN).status_code == 200
        await_that(lambda: client.get("/v1/debug/log", headers=ADMIN).json() == {"level": "info"})
        assert server.workers() == workers
        logged = server.generate(client, "echo").headers["x-request-id"]
        await_that(lambda: any(entry.get("id") == logged for entry in entries(server)))
        assert not any(entry.get("id") == silent or entry["message"] == "stack" for entry in entries(server))


def test_startup_and_readiness_of_chosen_models(server: FaultServer) -> None:
    assert server.fetch("/v2/health/startup") == (200, {"started": True, "waits_for": []})
    status, document = server.fetch("/health?model=ovserve-builtin,ovserve-builtin")
    assert (status, document["models"]) == (200, {"ovserve-builtin": {"ready": True, "reason": ""}})
    assert server.fetch("/health?model=none")[0] == 404


def test_lines_about_a_job_have_the_request_id(server: FaultServer) -> None:
    with server.client() as client:
        reply: httpx.Response = server.generate(client, "exit 3")
        assert reply.status_code == 500
        request = reply.headers["x-request-id"]
        await_that(lambda: any(entry.get("id") == request for entry in entries(server)))
        assert any(entry.get("job") == request for entry in entries(server))


def test_lines_of_native_libraries_have_the_request_ids(server: FaultServer) -> None:
    def natives(word: str) -> list[dict[str, object]]:
        return [
            entry for entry in entries(server) if str(entry["message"]).startswith("native: ") and word in str(entry)
        ]

    with server.client() as client:
        alone = server.generate(client, "native 0.2").headers["x-request-id"]
        await_that(lambda: len(natives(alone)) == 2)
        for entry, text in zip(natives(alone), ("first", "second"), strict=True):
            assert entry["message"] == f"native: [lib] {text} of {alone}"
            assert (entry["id"], str(entry["worker"]).partition("/")[0]) == (alone, "ovserve-builtin")
        failed = server.generate(client, "abort terminate called: no memory")
        assert failed.status_code == 500
        await_that(lambda: bool(natives("terminate called")))
        assert {entry["id"] for entry in natives("terminate called")} == {failed.headers["x-request-id"]}
    assert all(
        line.startswith(("{", "ready", "Fatal Python", "Current thread", "Thread", "  File", "Extension")) or not line
        for line in list(server.log)
    ), "a native line outside the log"


def test_line_of_a_call_with_several_requests_has_all_ids(tmp_path: Path) -> None:
    options = ("--log_format", "json", "--replicas", "1", "--plugin_config", '{"capacity": 2}')
    with FaultServer(tmp_path, *options) as server, server.client() as client:
        first = threading.Thread(target=server.generate, args=(client, "sleep 2"))
        first.start()
        await_that(lambda: client.get("/v1/models").json()["data"][0]["running"] == 1)
        second = server.generate(client, "native 0").headers["x-request-id"]
        first.join()
        found = [entry for entry in entries(server) if str(entry["message"]).startswith("native: ")]
        assert found
        for entry in found:
            ids = str(entry["ids"]).split(",")
            assert len(ids) == 2
            assert second in ids
