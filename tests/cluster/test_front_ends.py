"""Several front ends on one cluster, behind HAProxy: each owns its actors, and pictures are found by any of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer, picture_of
from tests.proxies import run_balancer
from tests.raycluster import RayCluster

PATIENCE_S = 90.0


@pytest.mark.heavy
def test_front_end_that_is_killed_loses_its_actors_and_nothing_else(cluster: RayCluster, tmp_path: Path) -> None:
    options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1")
    options += ("--store_dir", str(tmp_path / "store"), "--trusted_proxies", "127.0.0.1")
    with ExitStack() as stack:
        servers: list[FaultServer] = []
        owned: list[set[int]] = []  # actors of each front end
        for name in ("a", "b"):
            tmp_path.joinpath(name).mkdir()
            before = set(cluster.actors())
            servers.append(stack.enter_context(FaultServer(tmp_path / name, *options)))
            owned.append(set(cluster.actors()) - before)
        assert [len(actors) for actors in owned] == [1, 1]
        client = stack.enter_context(run_balancer("haproxy", tmp_path, [server.port for server in servers]))
        body = {"prompt": "echo kept", "response_format": "url"}
        urls = [
            httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()["data"][0]["url"]
            for server in servers
        ]
        for url in urls:
            assert all(client.get(httpx.URL(url).path).content.startswith(b"echo kept") for _ in range(4))
        first, second = servers
        first.process.kill()
        first.wait()
        second.until(lambda: not owned[0] & set(cluster.actors()), PATIENCE_S)
        assert owned[1] <= set(cluster.actors())
        for number in range(8):
            assert picture_of(client.post("/v1/images/generations", json={"prompt": f"echo {number}"})).startswith(
                b"echo"
            )
        assert all(client.get(httpx.URL(url).path).content.startswith(b"echo kept") for url in urls)
        assert not second.logged("worker died")
