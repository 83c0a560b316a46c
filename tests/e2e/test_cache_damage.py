"""Compiled models are kept between starts, and never served damaged: the built-in model, real workers."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.live import BUILTIN_NAME, LiveServer


def start(folder: Path, program: Sequence[str] = (), **variables: str) -> LiveServer:
    environment = {"CACHE_DIRECTORY": str(folder / "cache"), **variables}
    return LiveServer(spool=folder / "spool", environment=environment, program=program)


def picture(server: LiveServer) -> bytes:
    body = {"model": BUILTIN_NAME, "prompt": "a red star on a white background", "seed": 7, "num_inference_steps": 4}
    reply = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return base64.b64decode(reply.json()["data"][0]["b64_json"])


def blobs(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "compiled").glob("*/*.blob"), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return a folder whose cache one server has filled, and that server's picture."""
    folder = tmp_path_factory.mktemp("compiled")
    with start(folder) as server:
        made = picture(server)
    return folder, made


def test_second_start_loads_what_the_first_has_stored(filled: tuple[Path, bytes]) -> None:
    folder, expected = filled
    stored = {path: path.stat().st_mtime_ns for path in blobs(folder)}
    assert stored
    with start(folder) as server:
        assert picture(server) == expected
        assert not [line for line in server.log if "deleted" in line]
    assert {path: path.stat().st_mtime_ns for path in blobs(folder)} == stored
    assert oct((folder / "cache" / "compiled").stat().st_mode & 0o777) == "0o700"


def test_damaged_blob_is_deleted_and_the_picture_is_the_same(filled: tuple[Path, bytes]) -> None:
    folder, expected = filled
    largest = blobs(folder)[-1]
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2048] = bytes(byte ^ 0x55 for byte in content[middle : middle + 2048])
    times = largest.stat()
    largest.write_bytes(content)
    os.utime(largest, ns=(times.st_atime_ns, times.st_mtime_ns))
    with start(folder) as server:
        assert picture(server) == expected
        assert [line for line in server.log if "damaged or unlisted file of the cache deleted" in line]


def test_disk_that_is_full_costs_only_the_cache(filled: tuple[Path, bytes], tmp_path: Path) -> None:
    _, expected = filled
    # No file may grow beyond 1 MiB: as on a full disk, writing fails. The files of the spool are smaller.
    code = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        "os.execv(sys.executable, [sys.executable, '-m', 'ovserve', *sys.argv[1:]])"
    )
    with start(tmp_path, [sys.executable, "-c", code]) as server:
        assert picture(server) == expected
    assert all(path.stat().st_size < 1 << 20 for path in blobs(tmp_path))
