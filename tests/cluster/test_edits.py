"""A live server whose workers are on the nodes of a cluster: the same requests and the same bytes as on one machine."""

from __future__ import annotations

import concurrent.futures
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.faultserver import FaultServer
from tests.live import LiveServer
from tests.raycluster import RayCluster

PROMPT = "a green circle on a blue background"


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
