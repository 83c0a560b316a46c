"""A cluster whose nodes Ray's autoscaler adds when workers wait for a place, and removes when none needs them."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from tests.faultserver import FaultServer, picture_of
from tests.live import BUILTIN_PATH
from tests.proxies import free_port
from tests.raycluster import RayCluster

ADMIN = {"authorization": "Bearer sk-admin"}
PATIENCE_S = 180.0


@pytest.mark.heavy
def test_nodes_are_added_for_waiting_workers_and_removed_after_them(tmp_path: Path) -> None:
    with RayCluster(cpus=0, port=free_port(), grows_to=2) as cluster:

        def write(replicas: int) -> None:
            (tmp_path / "config.toml").write_text(
                f'default_pool = "ray"\nray_address = "{cluster.address}"\n'
                f"[[model]]\nname = 'm'\npath = {json.dumps(BUILTIN_PATH)}\nreplicas = {replicas}\n"
            )

        write(2)
        options = ("--config", str(tmp_path / "config.toml"), "--admin_key", "sk-admin")
        assert len(cluster.nodes()) == 1, "the head alone"
        with FaultServer(tmp_path / "spool", *options, wait_ready=False, environment=cluster.environment) as server:
            server.until(lambda: bool(server.lines), PATIENCE_S)  # ready
            server.until(lambda: server.model_status()["workers"] == 2, PATIENCE_S)
            assert len(cluster.nodes()) == 3
            assert server.logged("autoscaler asked for room", "workers=1")
            assert re.search(r"From request_resources:\n \{'CPU': 1.0\}: \d", cluster.autoscaler_log())
            with server.client() as client:
                assert picture_of(server.generate(client, "echo x")).startswith(b"echo x")
                write(1)
                assert client.post("/v1/config/reload?wait_s=60", headers=ADMIN).status_code == 200
                server.until(lambda: len(cluster.nodes()) == 2, PATIENCE_S)
                assert server.logged("autoscaler asked for room", "workers=0")
                assert picture_of(server.generate(client, "echo y")).startswith(b"echo y")


@pytest.mark.heavy
def test_automatic_replicas_get_a_node_while_jobs_wait(tmp_path: Path) -> None:
    with RayCluster(cpus=0, port=free_port(), grows_to=2) as cluster:
        options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1", "--replicas", "auto")
        with (
            FaultServer(
                tmp_path, *options, toy_options={"capacity": 1}, wait_ready=False, environment=cluster.environment
            ) as server,
            contextlib.ExitStack() as streams,
        ):
            server.until(lambda: bool(server.lines), PATIENCE_S)  # ready
            assert len(cluster.nodes()) == 2
            client = streams.enter_context(server.client(PATIENCE_S))
            for _ in range(2):  # each holds a worker until its connection is closed
                body = {"prompt": "sleep 600", "stream": True}
                streams.enter_context(client.stream("POST", "/v3/images/generations", json=body))
            server.until(lambda: server.model_status()["running"] == 2, PATIENCE_S)
            assert len(cluster.nodes()) == 3
