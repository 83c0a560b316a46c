from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovserve.cli import doctor
from ovserve.cli.commands import ExitCode
from ovserve.cli.doctor import OK, PROBLEM, WARNING, Finding, findings

DEVICES = Finding(OK, "devices: CPU")


def by_subject(port: int, spool: Path) -> dict[str, Finding]:
    found = list(findings(port, spool, lambda: DEVICES))
    return dict(zip(("python", "packages", "devices", "memory", "spool", "port"), found, strict=True))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_sound_machine_has_no_findings_to_act_on(tmp_path: Path) -> None:
    found = by_subject(free_port(), tmp_path)
    assert {name: finding.state for name, finding in found.items()} == dict.fromkeys(found, OK)
    assert not any(finding.advice for finding in found.values())


def test_port_in_use_is_a_warning(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        finding = by_subject(listener.getsockname()[1], tmp_path)["port"]
    assert (finding.state, "--port" in finding.advice) == (WARNING, True)


def test_spool_that_is_missing_or_small_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    missing = by_subject(port, tmp_path / "none")["spool"]
    assert (missing.state, "--spool_dir" in missing.advice) == (PROBLEM, True)
    usage = SimpleNamespace(free=1 << 26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    small = by_subject(port, tmp_path)["spool"]
    assert (small.state, "--shm-size" in small.advice) == (WARNING, True)


def test_missing_packages_and_little_memory_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "openvino-genai":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "machine_memory_bytes", lambda: 1 << 30)
    found = by_subject(free_port(), tmp_path)
    assert found["packages"] == Finding(PROBLEM, "missing packages: openvino-genai", "pip install openvino-genai")
    assert found["memory"].state == WARNING


@pytest.mark.parametrize(
    ("result", "state", "text"),
    [
        (subprocess.CompletedProcess([], 0, "CPU: some CPU\n  threads: 2\n", ""), OK, "devices: CPU: some CPU"),
        (subprocess.CompletedProcess([], -11, "", ""), PROBLEM, "exit code -11"),
        (subprocess.CompletedProcess([], 69, "", "ovserve: no module\n"), PROBLEM, "no module"),
        (subprocess.TimeoutExpired([], 1), PROBLEM, "in time"),
    ],
)
def test_devices_are_asked_in_another_process(
    result: object, state: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> object:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    finding = list(findings(free_port(), tmp_path))[2]
    assert (finding.state, text in finding.text) == (state, True)


def test_command_prints_each_finding_and_fails_for_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "findings", lambda _: iter([Finding(OK, "fine"), Finding(PROBLEM, "bad", "mend it")]))
    assert doctor.run([]) == ExitCode.MODELS_FAILED
    assert capsys.readouterr().out == f"ok       fine\nproblem  bad\n{'':8} -> mend it\n"
    monkeypatch.setattr(doctor, "findings", lambda _: iter([Finding(WARNING, "small")]))
    assert doctor.run(["--port", "0"]) == ExitCode.OK
