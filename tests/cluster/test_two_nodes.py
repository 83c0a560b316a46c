"""What scripts/test runs on a cluster: one with two nodes, for all tests of this file, so that it is started once.

The contract of the process boundary, with the front end's spool as its store; a live server whose workers are on the
nodes, with the same requests and the same bytes as on one machine; a killed actor; a reload.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ovserve.wire.local.spool import Spool
from ovserve.wire.ray.launcher import RayLauncher
from tests.faultserver import FaultServer, picture_of
from tests.live import BUILTIN_PATH, LiveServer
from tests.puppet import Puppet, PuppetBlobs, puppet_main
from tests.raycluster import RayCluster
from tests.wirecontract import *  # noqa: F403 - its tests are collected here
from tests.wirecontract import LIMIT_BYTES, Ends, Stores

PROMPT = "a green circle on a blue background"
ADMIN = {"authorization": "Bearer sk-admin"}
PATIENCE_S = 90.0


# --- the contract of the process boundary -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    made = Spool(tmp_path_factory.mktemp("spool"), LIMIT_BYTES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def launcher(cluster: RayCluster, spool: Spool) -> Iterator[RayLauncher]:
    made = RayLauncher(puppet_main, spool.worker_blobs(), cluster.address, 60.0)
    made.prepare()
    yield made
    made.close()


@pytest.fixture
def ends(launcher: RayLauncher, tmp_path: Path) -> Iterator[Ends]:
    puppet = Puppet(launcher, tmp_path)
    puppet.settle()
    yield puppet.link, puppet
    puppet.link.close()
    puppet.process.kill()
    puppet.process.close()


@pytest.fixture(scope="module")
def puppet(launcher: RayLauncher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Puppet]:
    made = Puppet(launcher, tmp_path_factory.mktemp("puppet"))
    made.settle()
    yield made
    made.link.close()
    made.process.close()


@pytest.fixture
def stores(spool: Spool, puppet: Puppet) -> Stores:
    return spool, PuppetBlobs(puppet, spool)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Start a server with two workers on the cluster."""
    options = ("--pool", "ray", "--ray_address", cluster.address, "--replicas", "2", "--log_format", "json")
    with FaultServer(tmp_path_factory.mktemp("spool"), *options, real=True) as live:
        yield live


def client_of(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def outcomes(server: LiveServer, data: Path) -> list[str]:
    """Return the pictures of an edit, a masked edit, a large upload, two pictures at once, and a stream."""
    image, mask = (data / "red_circle.png").read_bytes(), (data / "mask_white.png").read_bytes()
    large = (data / "rotated_star.jpg").read_bytes()
    known: dict[str, Any] = {"seed": 4, "strength": 0.8, "metadata": False}
    with client_of(server) as client:
        edited = client.images.edit(image=image, prompt=PROMPT, extra_body=known)
        masked = client.images.edit(image=image, mask=mask, prompt=PROMPT, extra_body=known)
        photo = client.images.edit(image=large, prompt=PROMPT, extra_body=known)
        several = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 9, "metadata": False})
        stream = client.images.edit(image=image, prompt=PROMPT, stream=True, partial_images=1, extra_body=known)
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    replies = [*edited.data, *masked.data, *photo.data, *several.data, *events]
    return [reply.b64_json for reply in replies]


def test_pictures_are_those_of_the_local_pool(server: LiveServer, remote: FaultServer, data: Path) -> None:
    local, far = outcomes(server, data), outcomes(remote, data)
    assert len(local) == 7
    assert far == local


def test_two_nodes_serve_at_once(remote: FaultServer) -> None:
    remote.until(lambda: remote.fetch("/v1/status")[1]["models"][0]["workers"] == 2)

    def generate(seed: int) -> int:
        body = {"prompt": PROMPT, "seed": seed}
        return httpx.post(f"{remote.url}/v1/images/generations", json=body, timeout=120).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(generate, range(16))) == {200}
    workers = remote.fetch("/v1/status")[1]["workers"]
    assert all(worker["jobs_done"] for worker in workers), workers


def test_log_of_a_worker_arrives_line_by_line(remote: FaultServer) -> None:
    lines = [json.loads(line) for line in list(remote.log) if line.startswith("{")]
    assert any(line["logger"].startswith("ovserve.engines") for line in lines)


def test_stacks_of_a_worker_on_a_node_are_logged(remote: FaultServer) -> None:
    remote.signal(signal.SIGUSR1)
    remote.until(lambda: bool(remote.logged('"stack"', "worker of ovserve-builtin", '"node"')))


def test_deadline_ends_a_job_on_a_node(remote: FaultServer) -> None:
    reply = httpx.post(
        f"{remote.url}/v1/images/generations",
        json={"prompt": PROMPT, "n": 8, "num_inference_steps": 100, "timeout_s": 0.2},
        timeout=60,
    )
    assert reply.status_code == 504
    remote.until(lambda: not remote.fetch("/v1/status")[1]["models"][0]["running"])


def test_client_that_goes_away_ends_its_job_on_a_node(remote: FaultServer) -> None:
    body = {"prompt": PROMPT, "n": 10, "num_inference_steps": 100, "stream": True, "partial_images": 1}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{remote.url}/v1/images/generations", json=body) as reply,
    ):
        next(reply.iter_raw())
    remote.until(lambda: not remote.fetch("/v1/status")[1]["models"][0]["running"])


# --- more workers while jobs wait -------------------------------------------------------------------------------------


def test_automatic_replicas_grow_on_the_cluster_while_jobs_wait(cluster: RayCluster, tmp_path: Path) -> None:
    options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1", "--replicas", "auto")
    others = set(cluster.actors())
    with (
        FaultServer(tmp_path, *options, toy_options={"capacity": 1}) as toys,
        toys.client() as client,
        contextlib.ExitStack() as streams,
    ):
        assert toys.model_status()["workers"] == 1
        for _ in range(2):  # each holds a worker until its connection is closed
            body = {"prompt": "sleep 600", "stream": True}
            streams.enter_context(client.stream("POST", "/v3/images/generations", json=body))
        toys.until(lambda: toys.model_status()["running"] == 2, PATIENCE_S)
        assert toys.model_status()["workers"] == 2
        assert len(set(cluster.actors()) - others) == 2
        streams.close()
        toys.until(lambda: not toys.model_status()["running"])
        assert picture_of(toys.generate(client, "echo x")).startswith(b"echo x")


# --- faults and reloads -----------------------------------------------------------------------------------------------


def test_job_of_a_killed_actor_is_done_by_the_next_one(cluster: RayCluster, tmp_path: Path) -> None:
    options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1")
    others = set(cluster.actors())
    with FaultServer(tmp_path, *options) as toys, toys.client() as client:
        replies: list[httpx.Response] = []
        job = threading.Thread(target=lambda: replies.append(toys.edit(client, "sleep 3")))
        job.start()
        toys.until(lambda: toys.model_status()["running"] == 1)
        [actor] = set(cluster.actors()) - others
        os.kill(actor, signal.SIGKILL)
        job.join(PATIENCE_S)
        assert replies[0].status_code == 200
        assert toys.logged("worker died", "ActorDiedError")
        assert toys.logged("job requeued")


def test_reload_replaces_the_actors_of_changed_models_alone(cluster: RayCluster, tmp_path: Path) -> None:
    def write(*models: dict[str, Any]) -> None:
        lines = [f'default_pool = "ray"\nray_address = "{cluster.address}"']
        for model in models:
            values = {"path": BUILTIN_PATH, "placement": "cpus=1", **model}
            lines += ["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        (tmp_path / "config.toml").write_text("\n".join(lines))

    kept, toy = {"name": "kept"}, json.dumps({"capacity": 3})
    write(kept, {"name": "changed"})
    options = ("--config", str(tmp_path / "config.toml"), "--admin_key", "sk-admin")
    others = set(cluster.actors())  # of servers that end now
    with FaultServer(tmp_path / "spool", *options) as server, server.client() as client:
        server.until(lambda: all(model["ready"] for model in server.fetch("/v3/models")[1]["data"]), PATIENCE_S)
        first = set(cluster.actors()) - others
        assert len(first) == 2
        write(kept, {"name": "changed", "plugin_config": toy})
        assert client.post("/v1/config/reload?wait_s=60", headers=ADMIN).status_code == 200
        server.until(lambda: len(set(cluster.actors()) - others) == 2, PATIENCE_S)
        assert len(first & set(cluster.actors())) == 1
        ready = [line.split("worker=")[1].split()[0] for line in server.logged("worker ready")]
        assert sorted(ready) == ["changed/0#0", "changed/0#1", "kept/0#0"]
        for name in ("kept", "changed"):
            assert picture_of(server.generate(client, "echo x", model=name)).startswith(b"echo x")
