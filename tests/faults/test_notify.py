"""What the server sends to systemd, over a real notify socket."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.cli.commands import ExitCode
from tests.faultserver import PATIENCE_S, FaultServer
from tests.live import BUILTIN_PATH


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def next_notification(manager: socket.socket) -> dict[str, str]:
    """Return the fields of the next datagram that is not the watchdog's."""
    while True:
        found = dict(line.split("=", 1) for line in manager.recv(65536).decode().split("\n"))
        if "WATCHDOG" not in found:
            return found


def test_service_notifies_ready_watchdog_reloading_and_stopping(
    tmp_path: Path, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "900000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with FaultServer(tmp_path / "spool", toy_options={"load_s": 0.5}) as server:
        found = next_notification(manager)
        assert found["READY"] == "1"
        assert "ovserve-builtin" in found["STATUS"]
        assert server.logged("worker ready")
        fed = 0
        until = time.monotonic() + PATIENCE_S
        while fed < 3:
            fed += manager.recv(65536) == b"WATCHDOG=1"
            assert time.monotonic() < until
        server.signal(signal.SIGHUP)
        found = next_notification(manager)
        assert found["RELOADING"] == "1"
        assert int(found["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert next_notification(manager)["READY"] == "1"
        server.signal(signal.SIGTERM)
        assert next_notification(manager)["STOPPING"] == "1"
        assert server.wait() == 0


def write_config(path: Path, ready_models: str, **loads: dict[str, object]) -> str:
    """Write a configuration with one model for each keyword, the first of them the default; return its path."""
    lines = [f'ready_models = "{ready_models}"', f'default_model = "{next(iter(loads))}"']
    for name, options in loads.items():
        lines += [
            "[[model]]",
            f'name = "{name}"',
            f'path = "{BUILTIN_PATH}"',
            f"plugin_config = '{json.dumps(options)}'",
        ]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("which", "others"),
    [("default", {"quick": {}, "hanging": {"load": "hang"}}), ("all", {"quick": {}, "slower": {"load_s": 2.5}})],
)
def test_ready_waits_for_the_models_that_readiness_waits_for(
    tmp_path: Path, manager: socket.socket, which: str, others: dict[str, dict[str, object]]
) -> None:
    config = write_config(tmp_path / "config.toml", which, slow={"load_s": 2.0}, **others)
    with FaultServer(tmp_path / "spool", "--config", config, wait_ready=False) as server:
        assert next_notification(manager)["READY"] == "1"
        server.await_ready()  # the line on standard output comes before READY
        assert server.fetch("/v2/health/ready")[0] == 200


def test_ready_waits_for_one_model_with_any(tmp_path: Path, manager: socket.socket) -> None:
    config = write_config(tmp_path / "config.toml", "any", hanging={"load": "hang"}, quick={})
    with FaultServer(tmp_path / "spool", "--config", config, wait_ready=False):
        assert next_notification(manager)["READY"] == "1"


def test_ready_does_not_wait_for_a_model_that_has_failed_if_another_serves(
    tmp_path: Path, manager: socket.socket
) -> None:
    config = write_config(tmp_path / "config.toml", "all", broken={"load": "fail no such device"}, quick={})
    with FaultServer(tmp_path / "spool", "--config", config, wait_ready=False) as server:
        assert next_notification(manager)["READY"] == "1"
        server.await_ready()
        assert server.fetch("/v2/health/ready")[0] == 503


def test_service_that_cannot_load_its_model_never_notifies_ready(tmp_path: Path, manager: socket.socket) -> None:
    with FaultServer(tmp_path / "spool", toy_options={"load": "fail no such device"}, wait_ready=False) as server:
        assert server.wait() == ExitCode.MODELS_FAILED
    manager.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while datagram := manager.recv(65536):
            assert b"READY" not in datagram
