"""The head of a cluster is lost under a running server, and the cluster is created anew at the same address."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faultserver import FaultServer, picture_of
from tests.proxies import free_port
from tests.raycluster import RayCluster

PATIENCE_S = 200.0  # Ray gives up a head after a minute


@pytest.mark.heavy
def test_server_outlives_its_cluster_and_serves_on_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    first = RayCluster(cpus=2, port=port)
    for name, value in first.environment.items():
        monkeypatch.setenv(name, value)
    options = ("--pool", "ray", "--ray_address", f"127.0.0.1:{port}")
    with FaultServer(tmp_path, *options) as server, server.client() as client:
        assert first.address.endswith(f":{port}")
        assert picture_of(server.generate(client, "echo before")).startswith(b"echo before")
        first.stop()
        server.until(lambda: server.generate(client, "echo x").status_code == 503, PATIENCE_S)
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        with RayCluster(cpus=2, port=port, environment=first.environment) as _:
            server.until(lambda: client.get("/v2/health/ready").status_code == 200, PATIENCE_S)
            assert picture_of(server.generate(client, "echo after")).startswith(b"echo after")
        assert os.path.exists(f"/proc/{server.process.pid}")
