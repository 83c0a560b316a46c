"""A store directory that is full or cannot be written: errors of their own, and the server keeps serving."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faultserver import FaultServer


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of one page, which the directory of the pictures uses up."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "full", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user does not have")
    (folder / "used").write_bytes(bytes(4096))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_store_is_store_full_and_not_spool_full(tmp_path: Path, full: Path) -> None:
    with FaultServer(tmp_path / "spool", "--store_dir", str(full)) as server, server.client() as client:
        reply = server.generate(client, "echo", response_format="url")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_full")
        assert "No space left on device" in reply.json()["error"]["message"]
        assert reply.headers["retry-after"]
        assert server.generate(client, "echo").status_code == 200
        (full / "used").unlink()
        assert server.generate(client, "echo", response_format="url").status_code == 200


def test_store_that_cannot_be_created_is_store_unusable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = tmp_path / "file" / "pictures"
    with FaultServer(tmp_path / "spool", "--store_dir", str(store)) as server, server.client() as client:
        reply = server.generate(client, "echo", response_format="url")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_unusable")
        assert "Not a directory" in reply.json()["error"]["message"]
        assert server.generate(client, "echo").status_code == 200
