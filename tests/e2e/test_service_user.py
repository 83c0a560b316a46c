"""The server as a user without a home directory and without an entry in the user database, as with DynamicUser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live import BUILTIN_PATH, PINNED, READY_TIMEOUT_S, STOP_TIMEOUT_S

UID = 12345  # has no entry in the user database of a usual machine


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Start a server as that user; yield its URL."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("changing the user needs root and setpriv")
    for folder in ("spool", "tmp"):
        (tmp_path / folder).mkdir()
        os.chown(tmp_path / folder, UID, UID)
    tmp_path.chmod(0o755)
    # The interpreter and the checkout may lie where only root can read: keep the right to read every file.
    user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--bounding-set=-all,+dac_read_search"]
    command = [*user, sys.executable, "-m", "ovserve", "--port", "0", *PINNED, "--model_path", BUILTIN_PATH]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with subprocess.Popen(
        [*command, "--spool_dir", str(tmp_path / "spool")],
        env={**kept, "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        killer = threading.Timer(READY_TIMEOUT_S, server.kill)  # ends the wait for a line
        killer.start()
        assert server.stdout
        line = server.stdout.readline()
        killer.cancel()
        try:
            assert line.startswith("ready "), f"exit code {server.wait(STOP_TIMEOUT_S)}"
            yield line.split()[1]
        finally:
            server.terminate()
            assert server.wait(STOP_TIMEOUT_S) == 0


def test_user_without_a_home_gets_pictures_as_data_and_as_urls(url: str, tmp_path: Path) -> None:
    document = {"prompt": "a red star", "num_inference_steps": 2, "size": "256x256"}
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/images/generations", json=document).json()["data"][0]["b64_json"]
        kept = client.post("/v1/images/generations", json={**document, "response_format": "url"})
        assert kept.status_code == 200, kept.text
        with urllib.request.urlopen(kept.json()["data"][0]["url"], timeout=30) as reply:
            assert reply.read(8) == b"\x89PNG\r\n\x1a\n"
    [picture] = (tmp_path / "tmp" / f"ovserve-{UID}" / "pictures").iterdir()
    assert picture.stat().st_uid == UID
