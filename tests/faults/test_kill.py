"""SIGKILL of a worker at every point of a job and of its life cycle: the response, and what is left afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ovserve.cli.commands import ExitCode
from tests.faultserver import TINY_PNG, FaultServer, gone, picture_of

POINTS = ["received", "prepared", "step", "announced", "half", "filled", "reported", "done"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    with FaultServer(tmp_path_factory.mktemp("spool"), "--replicas", "2") as server:
        server.until(lambda: server.model_status()["workers"] == 2)
        yield server
        assert server.stop() == 0
        assert not server.logged("Traceback")
        assert not server.logged("iteration", "failed")  # of the loops of dispatcher and supervisor


@pytest.fixture
def client(live: FaultServer) -> Iterator[httpx.Client]:
    """A client of a server with two ready workers; checks that the test leaves no resources in use."""
    live.until(lambda: live.model_status()["workers"] == 2)
    before = live.resources()
    with live.client() as made:
        yield made
    live.until(lambda: live.model_status()["workers"] == 2)
    live.until_released(before)
    live.until(lambda: live.segments() == [])


@pytest.mark.parametrize("point", POINTS)
def test_job_is_done_although_its_worker_is_killed_once(
    live: FaultServer, client: httpx.Client, tmp_path: Path, point: str
) -> None:
    reply = live.generate(client, f"once {tmp_path / 'died'} dies {point}", n=2, seed=11)
    assert picture_of(reply, 1) == f"once {tmp_path / 'died'} dies {point}|12".encode()
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("point", [point for point in POINTS if point != "done"])
def test_job_that_kills_two_workers_is_500_worker_crashed(live: FaultServer, client: httpx.Client, point: str) -> None:
    reply = live.edit(client, f"dies {point}")
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "worker_crashed"
    assert reply.headers["x-should-retry"] == "false"
    assert picture_of(live.edit(client, "echo afterwards")) == TINY_PNG


VIOLATIONS = ["garbage", "wrong", "too large", "oversized", "unannounced", "unrequested", "short", "unprepared"]


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_worker_that_violates_the_protocol_is_killed_and_its_job_done(
    live: FaultServer, client: httpx.Client, tmp_path: Path, violation: str
) -> None:
    before = set(live.workers())
    reply = live.generate(client, f"once {tmp_path / 'marker'} {violation}", seed=1)
    assert picture_of(reply) == f"once {tmp_path / 'marker'} {violation}|1".encode()
    live.until(lambda: len(before & set(live.workers())) == 1)
    # Its link is closed too: on a busy machine it may exit before it is killed.
    assert live.logged("worker violated the protocol")


def test_worker_that_reports_done_twice_is_replaced_and_its_job_done(live: FaultServer, client: httpx.Client) -> None:
    before = set(live.workers())
    assert picture_of(live.generate(client, "twice", seed=1)) == b"twice|1"
    live.until(lambda: len(before & set(live.workers())) == 1)


def test_stream_continues_with_another_worker_and_sends_each_picture_once(
    live: FaultServer, client: httpx.Client, tmp_path: Path
) -> None:
    fields = {"stream": True, "partial_images": 2}
    with client.stream(
        "POST", "/v3/images/generations", json={"prompt": f"once {tmp_path / 'died'} dies reported", **fields}
    ) as reply:
        assert reply.status_code == 200
        text = reply.read().decode()
    assert text.count("event: image_generation.completed") == 1
    assert "error" not in text


def test_stream_whose_job_kills_two_workers_ends_with_an_error_event(live: FaultServer, client: httpx.Client) -> None:
    with client.stream("POST", "/v3/images/generations", json={"prompt": "dies step", "stream": True}) as reply:
        text = reply.read().decode()
    assert "worker_crashed" in text
    assert "completed" not in text


def test_jobs_beside_a_job_that_kills_workers_are_done(live: FaultServer, client: httpx.Client) -> None:
    answers: list[int] = []

    def ask(prompt: str) -> None:
        answers.append(live.generate(client, prompt).status_code)

    threads = [threading.Thread(target=ask, args=("sleep 0.3",)) for _ in range(6)]
    threads.append(threading.Thread(target=ask, args=("dies step",)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The other jobs may lose their first worker to the one that dies, but not their second: each runs alone then.
    assert sorted(answers) == [200] * 6 + [500]


def test_request_after_idle_workers_were_killed_is_answered(live: FaultServer, client: httpx.Client) -> None:
    pids = live.workers()
    for pid in pids:
        live.kill_worker(pid)
    assert picture_of(live.edit(client, "echo next")) == TINY_PNG
    assert not set(pids) & set(live.workers())


def test_request_whose_workers_are_killed_during_its_upload_is_answered(
    live: FaultServer, client: httpx.Client
) -> None:
    def body() -> Iterator[bytes]:
        yield b'{"prompt": "echo '
        pids = live.workers()
        for pid in pids:
            live.kill_worker(pid)
        live.until(lambda: all(gone(pid) for pid in pids))  # the front end may not have noticed, and dispatch to them
        yield b'received"}'

    reply = client.post("/v3/images/generations", content=body(), headers={"content-type": "application/json"})
    assert picture_of(reply).startswith(b"echo received|")


def test_death_of_a_worker_is_logged_with_signal_and_likely_cause(live: FaultServer, client: httpx.Client) -> None:
    pid = live.kill_worker()
    live.until(lambda: bool(live.logged("worker died", f"pid={pid}", "killed by signal 9 (SIGKILL): out of memory?")))


def test_worker_killed_while_loading_is_replaced(tmp_path: Path) -> None:
    with FaultServer(tmp_path, toy_options={"load_s": 0.5}, wait_ready=False) as server:
        server.until(lambda: len(server.workers()) == 1)
        first = server.kill_worker()
        server.await_ready()
        assert gone(first)
        with server.client() as client:
            assert server.generate(client, "echo x").status_code == 200


def test_job_of_a_worker_killed_while_draining_is_done(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server, server.client() as client:
        replies: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: replies.append(server.generate(client, "sleep 0.5")))
        asking.start()
        server.until(lambda: server.model_status()["running"] == 1)
        server.signal(signal.SIGTERM)
        server.until(lambda: bool(server.logged("draining")))
        server.kill_worker()
        asking.join()
        assert picture_of(replies[0]).startswith(b"sleep 0.5|")
        assert server.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_crash_loop_at_start_is_logged_and_has_its_own_exit_code(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--crash_loop_limit", "3", toy_options={"load": "segv"}, wait_ready=False) as server:
        assert server.wait() == ExitCode.MODELS_FAILED
    assert server.logged("3 workers in a row died", "SIGSEGV")
    assert list(tmp_path.iterdir()) == []


def test_crash_loop_of_a_running_model_is_reported_and_can_end(tmp_path: Path) -> None:
    marker = tmp_path / "broken"
    toy_options = {"load": f"until {marker} none"}
    marker.touch()
    arguments = ("--crash_loop_limit", "3", "--failed_retry_s", "1")
    with FaultServer(tmp_path / "spool", *arguments, toy_options=toy_options) as server, server.client() as client:
        marker.unlink()
        server.kill_worker()
        server.until(lambda: server.model_status()["reason"].startswith("failed: "))
        status, document = server.fetch("/v2/health/ready")
        assert status == 503
        assert "workers in a row died" in document["models"]["ovserve-builtin"]["reason"]
        reply = server.generate(client, "echo x")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_failed")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        marker.touch()
        server.until(lambda: server.model_status()["ready"])
        assert server.generate(client, "echo x").status_code == 200
