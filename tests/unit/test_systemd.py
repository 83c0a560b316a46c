"""Notifications to systemd, the watchdog, and the unit file."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovserve import systemd

UNIT = Path(__file__).parents[2] / "scripts" / "ovserve.service"


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Bind systemd's end of the notify socket: a path, or a name in the abstract namespace."""
    name = str(tmp_path / "notify") if request.param == "path" else "@ovserve-test-" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if name.startswith("@") else name)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listener


def receive(manager: socket.socket) -> dict[str, str]:
    """Return the assignments of the next datagram."""
    lines = manager.recv(65536).decode().split("\n")
    return dict(line.split("=", 1) for line in lines)


def test_ready_is_sent_with_the_status(manager: socket.socket) -> None:
    assert systemd.notify_ready("serving a, b")
    assert receive(manager) == {"READY": "1", "STATUS": "serving a, b"}


def test_status_is_sent(manager: socket.socket) -> None:
    assert systemd.notify_status("loading")
    assert receive(manager) == {"STATUS": "loading"}


def test_reloading_sends_the_monotonic_instant(manager: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    assert systemd.notify_reloading()
    assignments = receive(manager)
    assert assignments["RELOADING"] == "1"
    assert before <= int(assignments["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_stopping_is_sent(manager: socket.socket) -> None:
    assert systemd.notify_stopping()
    assert receive(manager)["STOPPING"] == "1"


def test_newline_in_a_status_adds_no_assignment(manager: socket.socket) -> None:
    systemd.notify_status("model\nWATCHDOG=1")
    assert receive(manager) == {"STATUS": "model WATCHDOG=1"}


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234", "/nowhere/at/all"])
def test_notification_without_a_manager_returns_false(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notify_ready("x")


def test_outside_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")


def test_manager_that_does_not_read_does_not_block(manager: socket.socket) -> None:
    sent = 0
    while systemd.notify_status("x" * 1000):
        sent += 1
        assert sent < 100_000
    assert sent > 0


@pytest.mark.parametrize(
    "notify", [lambda: systemd.notify_ready("x"), systemd.notify_reloading, systemd.notify_stopping]
)
def test_change_of_state_waits_for_a_slow_manager(manager: socket.socket, notify: Callable[[], bool]) -> None:
    while systemd.notify_status("x"):
        pass
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(notify()))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    while not receive(manager).keys() & {"READY", "RELOADING", "STOPPING"}:
        pass  # earlier datagrams
    thread.join()
    assert results == [True]


def test_change_of_state_is_dropped_when_the_manager_never_reads(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(systemd, "STATE_TIMEOUT_S", 0.3)
    while systemd.notify_status("x"):
        pass
    started, worked = time.monotonic(), time.thread_time()
    assert not systemd.notify_ready("x")
    assert 0.3 <= time.monotonic() - started < 3
    assert time.thread_time() - worked < 0.1  # it waits without polling
    assert "READY=1" in caplog.text


def test_watchdog_is_fed_at_most_three_times_in_an_interval(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    watchdog = systemd.Watchdog()
    assert watchdog.interval_s == 0.3
    for _ in range(5):
        watchdog.feed()
    assert receive(manager) == {"WATCHDOG": "1"}
    manager.settimeout(0)
    with pytest.raises(BlockingIOError):
        manager.recv(100)
    manager.settimeout(5)
    until = time.monotonic() + 0.15
    while time.monotonic() < until:
        watchdog.feed()
    assert receive(manager) == {"WATCHDOG": "1"}


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": ""}],
)
def test_watchdog_of_another_process_is_not_fed(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    watchdog = systemd.Watchdog()
    assert watchdog.interval_s == 0
    watchdog.feed()
    manager.settimeout(0)
    with pytest.raises(BlockingIOError):
        manager.recv(100)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_unit_file_passes_systemd_analyze(tmp_path: Path) -> None:
    # systemd-analyze checks that the program exists.
    text = UNIT.read_text().replace("/opt/ovserve/bin/python", shutil.which("true") or "/bin/true")
    unit = tmp_path / "ovserve.service"
    unit.write_text(text)
    found = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], check=False, capture_output=True, text=True)
    ours = [line for line in (found.stdout + found.stderr).splitlines() if "ovserve" in line]
    assert ours == []
    assert found.returncode == 0


def test_unit_file_leaves_the_drain_to_the_front_end() -> None:
    lines = UNIT.read_text().splitlines()
    assert "Type=notify" in lines
    assert "KillMode=mixed" in lines
    assert "ExecReload=/bin/sh -c 'kill -HUP ${MAINPID}'" in lines  # a minimal Debian has no /bin/kill
