"""Access to a live server: what a foreign web page and an operator get, and what a worker process knows of the keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer
from tests.live import children_of

KEY, ADMIN_KEY = "sk-e2e-1f0c7a5b9d", "adm-e2e-7c52e8b1aa"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultServer]:
    (tmp_path / "spool").mkdir()
    with FaultServer(tmp_path / "spool", "--admin_listen", str(tmp_path / "admin.sock")) as server:
        yield server


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[FaultServer]:
    (tmp_path / "spool").mkdir()
    environment = {"OVSERVE_API_KEY": KEY}
    with FaultServer(tmp_path / "spool", "--admin_key", ADMIN_KEY, environment=environment) as server:
        yield server


def test_foreign_page_cannot_use_a_keyless_server(server: FaultServer) -> None:
    with server.client() as client:
        rebound = {"host": f"evil.test:{server.port}", "origin": f"http://evil.test:{server.port}"}
        assert client.post("/v1/images/generations", json={"prompt": "echo a"}, headers=rebound).status_code == 421
        foreign = {"origin": "https://evil.test"}
        assert client.post("/v1/images/generations", json={"prompt": "echo a"}, headers=foreign).status_code == 403
        assert client.options("/v1/images/generations", headers=foreign).status_code == 403
        assert client.get("/v1/models", headers=foreign).status_code == 403
        assert client.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        for path in ("/", "/v2/health/ready"):
            assert client.get(path, headers=foreign).status_code == 200
            assert client.head(path, headers=foreign).status_code == 200
        own = {"origin": server.url}
        assert client.post("/v1/images/generations", json={"prompt": "echo a"}, headers=own).status_code == 200
        assert client.post("/v1/images/generations", json={"prompt": "echo a"}).status_code == 200
    lines = [line for line in server.log if "allowed_origins" in line]
    assert len(lines) == 2  # each origin once; the other is the one that sent only Sec-Fetch-Site
    assert lines[0].endswith("origin=https://evil.test")


def test_operators_use_the_admin_socket(server: FaultServer, tmp_path: Path) -> None:
    with server.client() as client:
        for method, path in (("POST", "/v1/config/reload"), ("GET", "/metrics"), ("GET", "/v1/config")):
            answer = client.request(method, path)
            assert answer.status_code == 403
            assert "admin_listen" in answer.json()["error"]["message"]
    transport = httpx.HTTPTransport(uds=str(tmp_path / "admin.sock"))
    with httpx.Client(transport=transport, base_url="http://ovserve") as operator:
        assert operator.post("/v1/config/reload").json()["reloaded"]
        assert "ovserve_http_responses_total" in operator.get("/metrics").text
        assert operator.get("/v1/config").status_code == 200
        assert operator.get("/v2/health/ready").status_code == 200


def test_reload_needs_the_admin_key(keyed: FaultServer) -> None:
    with keyed.client() as client:
        for key in (None, KEY):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert client.post("/v1/config/reload", headers=headers).status_code == 403
        assert client.post("/v1/config/reload", headers={"authorization": f"Bearer {ADMIN_KEY}"}).status_code == 200
        assert client.get("/metrics", headers={"api-key": KEY}).status_code == 200
        assert client.get("/metrics", headers={"api-key": ADMIN_KEY}).status_code == 200


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield the contents of each writable region of a process."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for begin, end in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw", maps, re.MULTILINE):
            memory.seek(int(begin, 16))
            try:
                yield memory.read(int(end, 16) - int(begin, 16))
            except OSError:  # a region of a device
                continue


def test_no_child_process_has_a_key_in_its_environment_or_memory(keyed: FaultServer) -> None:
    pids = children_of(keyed.process.pid)
    assert set(keyed.workers()) <= set(pids)
    assert keyed.workers()
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"PATH=" in environment
        for secret in (KEY.encode(), ADMIN_KEY.encode()):
            assert secret not in environment
            assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert not any(secret in region for region in memory_of(pid)), pid
    # The method finds what is there.
    assert any(KEY.encode() in region for region in memory_of(keyed.process.pid))
    assert not keyed.logged(KEY)
    assert not keyed.logged(ADMIN_KEY)
