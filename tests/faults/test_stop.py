"""How the front end ends: SIGTERM under load loses no request; after SIGKILL the next start removes what is left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer, gone
from tests.live import is_alive
from tests.rawclient import RawClient

PART_OF_A_FORM = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"x" * 50_000


def under_load(server: FaultServer, moment_s: float, number: int) -> list[int | str]:
    """Send signal `number` to the front end after `moment_s` of steady load, and return every client's outcome."""
    outcomes: list[int | str] = []
    content = b'{"prompt": "sleep 0.1"}'
    head = "POST /v3/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}"

    def send_requests() -> None:
        while "refused" not in outcomes:
            try:
                with RawClient(server.port) as client:
                    outcomes.append(client.send(head.encode() + b"\r\n\r\n" + content).read_response().status)
            except ConnectionRefusedError:
                outcomes.append("refused")
            except ConnectionError:
                outcomes.append("reset")

    threads = [threading.Thread(target=send_requests) for _ in range(6)]
    for thread in threads:
        thread.start()
    server.until(lambda: 200 in outcomes)
    time.sleep(moment_s)  # the test is about the moment of the signal: there is no event to wait for
    server.signal(number)
    for thread in threads:
        thread.join()
    return outcomes


def threads_that_receive(pid: int, number: int) -> list[str]:
    """Return the threads of a process that do not block a signal, without the main thread, which waits for it."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        if status.parent.name == str(pid):
            continue
        status_fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        if not int(status_fields["SigBlk"], 16) >> (number - 1) & 1:
            found.append(status_fields["Name"])
    return found


def test_sighup_to_the_process_group_reloads_and_ends_no_process(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server:
        tracker = server.tracker()
        os.killpg(server.process.pid, signal.SIGHUP)
        server.until(lambda: bool(server.logged("reloaded")))
        assert server.tracker() == tracker
        assert is_alive(tracker)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_sigterm_does_not_wait_for_a_reload_in_progress(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    os.mkfifo(config)
    first = threading.Thread(
        target=config.write_text, args=("",)
    )  # for the start; the reload finds no writer and waits
    first.start()
    with FaultServer(tmp_path / "spool", "--config", str(config)) as server:
        first.join()
        threads = server.resources().threads
        server.signal(signal.SIGHUP)
        server.until(lambda: server.resources().threads > threads)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_restarted_resource_tracker_leaves_signals_to_the_main_thread(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server:
        tracker = server.tracker()
        os.kill(tracker, signal.SIGKILL)
        server.until(lambda: not is_alive(tracker))
        server.kill_worker()
        server.until(lambda: len(server.logged("worker ready")) == 2)
        assert server.tracker() != tracker
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert threads_that_receive(server.process.pid, number) == []
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize(
    ("number", "round_number"), [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 3)]
)
def test_no_accepted_request_is_lost_at_a_stop(tmp_path: Path, number: int, round_number: int) -> None:
    with FaultServer(tmp_path) as server:
        workers = server.workers()
        outcomes = under_load(server, random.Random(round_number).random() * 0.3, number)
        assert server.wait() == 0
    # 503: the server is shutting down. Refused: it no longer listens. Reset: the request had not been read when the
    # server stopped listening. Every request that was read is in the log, and its client has received the status logged
    # there.
    assert set(outcomes) <= {200, 503, "refused", "reset"}, outcomes
    statuses = [line.split("POST /v3/images/generations ")[1].split()[0] for line in server.logged("POST /v3/")]
    assert sorted(statuses) == sorted(str(outcome) for outcome in outcomes if isinstance(outcome, int))
    assert not server.logged("connections cut")
    assert all(gone(pid) for pid in workers)
    assert list(tmp_path.iterdir()) == []


def test_drain_ends_at_the_grace_period_and_the_client_gets_an_outcome(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--grace_period_s", "0.5") as server, server.client() as client:
        outcome: list[object] = []

        def ask() -> None:
            try:
                outcome.append(server.generate(client, "sleep 60").status_code)
            except httpx.TransportError as error:
                outcome.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        server.until(lambda: server.model_status()["running"] == 1)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - started < 20
        asking.join()
        assert len(outcome) == 1
    assert list(tmp_path.iterdir()) == []


def test_shutdown_delay_serves_requests_but_is_not_ready(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--shutdown_delay_s", "3") as server:
        model = server.model_status()["id"]
        with server.client() as client:
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            server.until(lambda: server.fetch("/v2/health/ready")[0] == 503)
            assert server.fetch(f"/v2/models/{model}/ready") == (503, {"ready": False, "reason": "draining"})
            reply = server.edit(client, "echo")
            assert (reply.status_code, reply.headers["connection"]) == (200, "close")
            assert time.monotonic() - started < 3
        assert server.wait() == 0
        assert time.monotonic() - started >= 3


def test_upload_in_progress_gets_503_and_does_not_delay_the_stop(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--grace_period_s", "60", "--body_grace_s", "60") as server:
        with RawClient(server.port) as client:
            head = b"POST /v3/images/edits HTTP/1.1\r\nhost: [::]\r\ncontent-type: multipart/form-data; boundary=b\r\n"
            client.send(head + b"content-length: 1000000\r\n\r\n" + PART_OF_A_FORM)
            server.until(lambda: len(server.segments()) == 1)
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            response = client.read_response()
            assert (response.status, response.code) == (503, "draining")
            assert "retry-after" in response.fields
        assert server.wait() == 0
        assert time.monotonic() - started < 20
    assert list(tmp_path.iterdir()) == []


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server, server.client() as client:
        workers = server.workers()

        def ask() -> None:
            with pytest.raises(httpx.TransportError):
                server.generate(client, "sleep 60")

        asking = threading.Thread(target=ask)
        asking.start()
        server.until(lambda: server.model_status()["running"] == 1)
        server.signal(signal.SIGTERM)
        server.until(lambda: bool(server.logged("draining")))
        server.signal(signal.SIGTERM)
        assert server.wait(15) == 1
        asking.join()
        server.until(lambda: not any(is_alive(pid) for pid in workers))
    assert list(tmp_path.iterdir()) == []


def test_killed_front_end_leaves_no_worker_and_the_next_start_removes_its_segments(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--replicas", "2") as server:
        server.until(lambda: server.model_status()["workers"] == 2)
        workers = server.workers()
        clients = [threading.Thread(target=_expect_transport_error, args=(server,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        server.until(lambda: server.model_status()["running"] == 4)
        assert server.segments()
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        for thread in clients:
            thread.join()
        server.until(lambda: not any(is_alive(pid) for pid in workers), patience_s=5)
    assert len(list(tmp_path.iterdir())) == 1
    with FaultServer(tmp_path) as server:
        assert server.segments() == []
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def _expect_transport_error(server: FaultServer) -> None:
    with server.client() as client, pytest.raises(httpx.TransportError):
        server.generate(client, "sleep 60")


def test_stopped_and_loading_workers_die_with_a_killed_front_end(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--replicas", "2", toy_options={"load_s": 0.3}) as server:
        server.until(lambda: server.model_status()["workers"] == 2)
        server.kill_worker(server.workers()[1])
        server.until(lambda: len(server.workers()) == 2)
        workers = server.workers()
        server.kill_worker(workers[0], signal.SIGSTOP)
        server.signal(signal.SIGKILL)
        server.wait()
        server.until(lambda: not any(is_alive(pid) for pid in workers), patience_s=5)
