"""The commands of docs/scale-out.md for a cluster of one machine, and its command that withdraws a request for room."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import LiveServer
from tests.proxies import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "scale-out.md").read_text("utf-8")
PATIENCE_S = 120.0


@pytest.mark.heavy
def test_commands_of_the_page_start_a_cluster_and_a_server_on_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    start = re.search(r"^    (ray start --head .*)$", PAGE, re.MULTILINE)
    serve = re.search(r"^    (ovserve --pool ray --ray_address auto)$", PAGE, re.MULTILINE)
    withdraw = re.search(r"`python -c (\"[^\"]+\")`", PAGE)
    assert start
    assert serve
    assert withdraw
    folder = tmp_path_factory.mktemp("r")  # short: Ray's sockets are below
    # Its own place for the address that `auto` finds, loopback, and a token: the machine may have other users.
    variables = {
        "RAY_TMPDIR": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    head = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", *shlex.split(start[1])[1:], "--block",
         "--port", str(free_port())],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | variables, start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout
        for line in head.stdout:
            if "--block" in line:  # it has started everything, and says that it stays
                break
        with LiveServer(*shlex.split(serve[1])[1:], spool=folder / "spool", environment=variables) as server:
            assert server.fetch("/v2/health/ready")[0] == 200
            assert server.fetch("/v1/status")[1]["workers"]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", shlex.split(" ".join(withdraw[1].split()))[0]],
                env=os.environ | variables, check=False, capture_output=True, text=True, timeout=PATIENCE_S,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(PATIENCE_S)
        head.stdout.close()  # type: ignore[union-attr]
