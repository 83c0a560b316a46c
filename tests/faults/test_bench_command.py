"""`ovserve bench` against a live server with toy workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ovserve.cli.commands import ExitCode
from tests.faultserver import FaultServer


def bench(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "ovserve", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def test_every_request_is_counted_once(tmp_path: Path, data: Path) -> None:
    with FaultServer(tmp_path) as server:
        picture = ("--picture", str(data / "red_circle.png"))
        code, out, _ = bench(server.url, "--clients", "4", "--requests", "20", "-p", "echo a", *picture, "--json")
        result = json.loads(out)
        assert (code, result["answered"], result["failed"]) == (0, 20, 0)
        assert 0 < result["p50_s"] <= result["p90_s"] <= result["p99_s"] <= result["wall_s"]
        status = server.fetch("/v1/status")[1]
        assert sum(worker["jobs_done"] for worker in status["workers"]) == 20
        code, out, _ = bench(server.url, "--clients", "2", "--requests", "4", "-p", "raise")
        assert code == ExitCode.REFUSED
        assert "failed, 4 times" in out
    code, _, err = bench(server.url)
    assert (code, err.count("\n")) == (ExitCode.NO_SERVER, 1)
    assert bench("--clients", "0")[0] == ExitCode.USAGE
