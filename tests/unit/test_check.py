"""`ovserve check` and the exit codes of a start that fails."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import NoReturn

import pytest

from ovserve.cli import check, serve
from ovserve.cli.commands import ExitCode
from ovserve.errors import ModelError, ModelsFailed, SettingsError, may_pass


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OVSERVE_")]:
        monkeypatch.delenv(name)


def test_models_and_keys_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("sk-one\nsk-two\n")
    (tmp_path / "keys").chmod(0o600)
    assert check.run(["--port", "0", "--model_name", "shapes", "--api_key_file", str(tmp_path / "keys")]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert out.startswith("configuration is valid: host 127.0.0.1, port 0, 2 API keys\nmodel shapes: stable-diffusion ")
    assert "sk-" not in out
    assert err == ""


def test_wrong_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run(["--model_path", str(tmp_path / "none")]) == ExitCode.USAGE
    assert capsys.readouterr() == ("", f"ovserve: {tmp_path / 'none'}: no such directory\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("wrong"), ExitCode.USAGE),
        (ModelError("not mounted", is_transient=True), ExitCode.TRANSIENT),
        (ModelsFailed("no device"), ExitCode.MODELS_FAILED),
        (MemoryError(), ExitCode.TRANSIENT),
        (OSError(errno.EMFILE, "Too many open files"), ExitCode.TRANSIENT),
    ],
)
def test_error_at_the_start_has_its_exit_code(
    error: Exception, code: ExitCode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(serve, "Server", fail)
    monkeypatch.setattr(serve, "configure_logs", lambda *_: None)  # the logger belongs to pytest
    assert serve.run([]) == code
    assert (str(error) or "MemoryError") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EADDRINUSE, ""), True),
        (OSError(errno.EADDRNOTAVAIL, ""), True),
        (OSError(errno.ENOSPC, ""), True),
        (OSError(errno.EACCES, ""), False),
        (socket.gaierror(socket.EAI_AGAIN, ""), True),
        (socket.gaierror(socket.EAI_NONAME, ""), False),
    ],
)
def test_faults_that_may_pass(error: OSError, expected: bool) -> None:
    assert may_pass(error) is expected
