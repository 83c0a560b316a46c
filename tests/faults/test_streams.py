"""Closed or unwritable standard streams do not stop the server."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.live import BUILTIN_NAME, BUILTIN_PATH, PINNED

START_LIMIT_S = 60
SERVE = [*PINNED, "--port", "0", "--model_path", BUILTIN_PATH]


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffer the streams as by default: the flush at exit is what can fail."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def start(redirection: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the server from a shell with a redirection."""
    command = [sys.executable, "-m", "ovserve", *arguments]
    return subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("redirection", "before_port"),
    [
        ("<&-", "ready http://127.0.0.1:"),
        (">&-", "listening address=127.0.0.1 port="),
        ("2>&-", "ready http://127.0.0.1:"),
        (">/dev/full", "listening address=127.0.0.1 port="),
        ("2>/dev/full", "ready http://127.0.0.1:"),
    ],
)
def test_server_without_one_standard_stream_serves_and_exits_with_zero(
    tmp_path: Path, redirection: str, before_port: str
) -> None:
    with start(redirection, *SERVE, "--spool_dir", str(tmp_path)) as server:
        try:
            stream = server.stdout if before_port.startswith("ready") else server.stderr
            assert stream
            line = next((line for line in stream if before_port in line), "")
            port = line.partition(before_port)[2].split()[0]
            assert port.isdigit(), "the server did not report its port"
            if stream is server.stderr:
                assert any("worker ready" in line for line in stream)
            reply = httpx.post(
                f"http://127.0.0.1:{port}/v1/images/generations",
                json={"model": BUILTIN_NAME, "prompt": "a red star", "num_inference_steps": 2},
                timeout=START_LIMIT_S,
            )
            assert reply.status_code == 200
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=START_LIMIT_S)
            assert server.returncode == 0
        finally:
            server.kill()


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_start_error_without_streams_has_exit_code_two(redirection: str) -> None:
    with start(redirection, "--port", "99999") as server:
        server.communicate(timeout=START_LIMIT_S)
        assert server.returncode == 2
