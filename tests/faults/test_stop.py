"""The ends of the front end: SIGTERM under load loses nothing, SIGKILL leaves nothing that the next start does not sweep."""

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
    """Send `number` to the front end at `moment_s` of a steady load; every client's outcome."""
    outcomes: list[int | str] = []
    content = b'{"prompt": "sleep 0.1"}'
    head = f"POST /v3/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"

    def come() -> None:
        while "refused" not in outcomes:
            try:
                with RawClient(server.port) as client:
                    outcomes.append(client.send(head.encode() + b"\r\n\r\n" + content).read_response().status)
            except ConnectionRefusedError:
                outcomes.append("refused")
            except ConnectionError:
                outcomes.append("reset")

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    server.until(lambda: 200 in outcomes)
    time.sleep(moment_s)  # the moment is the test: nothing is awaited
    server.signal(number)
    for thread in threads:
        thread.join()
    return outcomes


def threads_that_take(pid: int, number: int) -> list[str]:
    """The threads of a process that do not block a signal, but for the main one, which waits for it."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        if status.parent.name == str(pid):
            continue
        told = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        if not int(told["SigBlk"], 16) >> (number - 1) & 1:
            found.append(told["Name"])
    return found


def test_sighup_to_the_whole_group_reloads_and_ends_nothing(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server:
        tracker = server.tracker()
        os.killpg(server.process.pid, signal.SIGHUP)
        server.until(lambda: bool(server.logged("reloaded")))
        assert server.tracker() == tracker
        assert is_alive(tracker)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_tracker_made_anew_leaves_the_signals_to_the_main_thread(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server:
        tracker = server.tracker()
        os.kill(tracker, signal.SIGKILL)
        server.until(lambda: not is_alive(tracker))
        server.kill_worker()
        server.until(lambda: len(server.logged("worker ready")) == 2)
        assert server.tracker() != tracker
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert threads_that_take(server.process.pid, number) == []
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
    # 503: told that the server is going down. Refused: it no longer listens. Reset: its request was not read when the server
    # stopped to listen. What was read is in the log, and its client has the answer that stands there.
    assert set(outcomes) <= {200, 503, "refused", "reset"}, outcomes
    statuses = [line.split("POST /v3/images/generations ")[1].split()[0] for line in server.logged("POST /v3/")]
    assert sorted(statuses) == sorted(str(outcome) for outcome in outcomes if isinstance(outcome, int))
    assert not server.logged("connections cut")
    assert all(gone(pid) for pid in workers)
    assert list(tmp_path.iterdir()) == []


def test_draining_is_told_and_ends_at_the_grace_period(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--grace_period_s", "0.5") as server, server.client() as client:
        outcome: list[object] = []

        def ask() -> None:
            try:
                outcome.append(server.generate(client, "sleep 60").status_code)
            except httpx.TransportError as error:
                outcome.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        server.until(lambda: server.standing()["running"] == 1)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - started < 20
        asking.join()
        assert len(outcome) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_upload_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--grace_period_s", "60", "--body_grace_s", "60") as server:
        with RawClient(server.port) as client:
            head = b"POST /v3/images/edits HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
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


def test_second_signal_ends_it_now(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server, server.client() as client:
        workers = server.workers()

        def ask() -> None:
            with pytest.raises(httpx.TransportError):
                server.generate(client, "sleep 60")

        asking = threading.Thread(target=ask)
        asking.start()
        server.until(lambda: server.standing()["running"] == 1)
        server.signal(signal.SIGTERM)
        server.until(lambda: bool(server.logged("draining")))
        server.signal(signal.SIGTERM)
        assert server.wait(15) == 1
        asking.join()
        server.until(lambda: not any(is_alive(pid) for pid in workers))
    assert list(tmp_path.iterdir()) == []


def test_killed_front_end_leaves_no_worker_and_the_next_start_sweeps_its_segments(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--replicas", "2") as server:
        server.until(lambda: server.standing()["workers"] == 2)
        workers = server.workers()
        clients = [threading.Thread(target=_ask_in_vain, args=(server,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        server.until(lambda: server.standing()["running"] == 4)
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


def _ask_in_vain(server: FaultServer) -> None:
    with server.client() as client, pytest.raises(httpx.TransportError):
        server.generate(client, "sleep 60")


def test_killed_front_end_takes_a_stopped_and_a_loading_worker_along(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--replicas", "2", told={"load_s": 0.3}) as server:
        server.until(lambda: server.standing()["workers"] == 2)
        server.kill_worker(server.workers()[1])
        server.until(lambda: len(server.workers()) == 2)
        workers = server.workers()
        server.kill_worker(workers[0], signal.SIGSTOP)
        server.signal(signal.SIGKILL)
        server.wait()
        server.until(lambda: not any(is_alive(pid) for pid in workers), patience_s=5)
