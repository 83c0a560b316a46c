"""Several front ends behind HAProxy and nginx as scripts/deploy configures them, with one directory of pictures."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer, picture_of
from tests.proxies import run_balancer


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_pictures_of_each_front_end_are_found_through_any(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = []
        for name in ("a", "b"):
            spool = tmp_path / name
            spool.mkdir()
            options = ("--store_dir", str(tmp_path / "store"), "--trusted_proxies", "127.0.0.1")
            servers.append(stack.enter_context(FaultServer(spool, *options)))
        client = stack.enter_context(run_balancer(kind, tmp_path, [server.port for server in servers]))
        urls = []
        for server in servers:
            body = {"prompt": "echo kept", "seed": 5, "response_format": "url"}
            urls.append(
                httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()["data"][0]["url"]
            )
        for _ in range(4):
            for url in urls:
                found = client.get(httpx.URL(url).path)
                assert found.status_code == 200
                assert found.content.startswith(b"echo kept")
        for number in range(8):
            reply = client.post("/v1/images/generations", json={"prompt": "echo x", "seed": number})
            assert picture_of(reply).startswith(b"echo x")
        done = [server.logged("POST /v1/images/generations 200") for server in servers]
        assert all(len(lines) > 1 for lines in done), "one front end has served everything"
        servers[0].stop()
        for _ in range(8):
            assert picture_of(client.post("/v1/images/generations", json={"prompt": "echo y"})).startswith(b"echo y")
        assert client.get(httpx.URL(urls[0]).path).content.startswith(b"echo kept"), "found by the other one"
