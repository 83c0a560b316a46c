"""Faults of a cluster under a running server with toy workers: an actor killed, a node lost and another added."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clusterchaos import run_cluster_chaos
from tests.faultserver import FaultServer, picture_of
from tests.proxies import free_port
from tests.raycluster import RayCluster

PATIENCE_S = 90.0  # Ray notices a lost node within some heartbeats


@pytest.fixture
def remote(cluster: RayCluster, tmp_path: Path) -> Iterator[FaultServer]:
    """Start a server with one toy worker, on the node that has the resource `first`."""
    options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1,first=1")
    with FaultServer(tmp_path, *options) as live:
        yield live


@pytest.mark.heavy
def test_job_that_kills_two_actors_is_a_500(remote: FaultServer) -> None:
    with remote.client() as client:
        reply = remote.edit(client, "dies received")
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "worker_crashed"
        assert reply.headers["x-should-retry"] == "false"
        assert picture_of(remote.generate(client, "echo on")).startswith(b"echo on")


@pytest.mark.heavy
def test_front_end_that_is_killed_takes_its_actors_with_it(remote: FaultServer, cluster: RayCluster) -> None:
    assert cluster.actors()
    remote.process.kill()
    remote.wait()
    remote.until(lambda: not cluster.actors(), PATIENCE_S)


@pytest.mark.heavy
def test_every_request_of_eight_clients_is_answered_whatever_is_lost(tmp_path: Path, data: Path) -> None:
    run = run_cluster_chaos(tmp_path, data / "red_circle.png", free_port(), kills=4, every_s=5.0)
    run.check()
    assert run.phases["actors killed"].faults == 4
    assert run.phases["cluster created anew"].statuses[503]


@pytest.mark.heavy
def test_worker_on_a_drained_node_finishes_its_job_and_another_takes_over(cluster: RayCluster, tmp_path: Path) -> None:
    node = cluster.add(cpus=1, fourth=1)
    options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1,fourth=1")
    with FaultServer(tmp_path, *options) as remote, remote.client() as client:
        other = cluster.add(cpus=1, fourth=1)
        replies: list[httpx.Response] = []
        job = threading.Thread(target=lambda: replies.append(remote.edit(client, "sleep 20")))
        job.start()
        remote.until(lambda: remote.model_status()["running"] == 1)
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
        drain += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        subprocess.run([*drain, "--deadline-remaining-seconds", "600"], check=True, timeout=60, capture_output=True)
        remote.until(lambda: bool(remote.logged("worker ready", other[:8])), PATIENCE_S)
        job.join(PATIENCE_S)
        assert replies[0].status_code == 200
        remote.until(lambda: bool(remote.logged("worker exited")), PATIENCE_S)
        assert not remote.logged("worker died")
        assert picture_of(remote.generate(client, "echo on")).startswith(b"echo on")
    cluster.remove(node)
    cluster.remove(other)


@pytest.mark.heavy
def test_model_without_a_node_is_a_503_until_a_node_is_added(cluster: RayCluster, tmp_path: Path) -> None:
    node = cluster.add(cpus=1, third=1)
    options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1,third=1")
    with FaultServer(tmp_path, *options) as remote, remote.client() as client:
        assert picture_of(remote.generate(client, "echo before")).startswith(b"echo before")
        metrics = client.get("/metrics").text
        assert f'ovserve_node_workers{{model="ovserve-builtin",node="127.0.0.1/{node[:8]}"}} 1.0' in metrics
        cluster.remove(node)
        remote.until(lambda: remote.generate(client, "echo x").status_code == 503, PATIENCE_S)
        refused = remote.generate(client, "echo x")
        assert "no node of the cluster has room" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert client.get("/v2/health/ready").status_code == 503
        added = cluster.add(cpus=1, third=1)
        remote.until(lambda: client.get("/v2/health/ready").status_code == 200, PATIENCE_S)
        assert picture_of(remote.generate(client, "echo after")).startswith(b"echo after")
    cluster.remove(added)
