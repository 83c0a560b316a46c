"""A node behind a slow network, in a namespace of its own: delays of 2 and 20 ms, cut off, and brought back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ovserve.models.profile import builtin_directory
from tests.fakehub import FakeHub
from tests.farnode import HEAD_HOST, FarNode, missing
from tests.faultserver import FaultServer, picture_of
from tests.live import LiveServer
from tests.raycluster import RayCluster
from tests.toys import bytes_of

PATIENCE_S = 180.0
CLIENTS = 4
SHORT_CUT_S = 4.0  # Ray gives up a node that does not answer for about a quarter of a minute
PICTURE_BYTES = 300_000


@pytest.fixture
def far() -> Iterator[FarNode]:
    if reason := missing():
        pytest.skip(reason)
    with FarNode() as node:
        yield node


@contextmanager
def load(server: FaultServer) -> Iterator[tuple[Counter[int], list[str]]]:
    """Ask for pictures from a few clients; count the statuses, and name what is wrong with a reply."""
    counts, wrong, ended = Counter[int](), list[str](), threading.Event()

    def ask(number: int) -> None:
        with server.client(PATIENCE_S) as client:
            for seed in range(number * 100000, number * 100000 + 100000):
                if ended.is_set():
                    return
                reply = server.generate(client, f"bytes {PICTURE_BYTES}", seed=seed)
                counts[reply.status_code] += 1
                if reply.status_code == 200 and picture_of(reply) != bytes_of(seed, PICTURE_BYTES):
                    wrong.append(f"seed {seed}")
                if reply.status_code == 503:
                    if "retry-after" not in reply.headers:
                        wrong.append("503 without Retry-After")
                    ended.wait(0.25)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield counts, wrong
    finally:
        ended.set()
        for thread in threads:
            thread.join(PATIENCE_S)


@pytest.mark.heavy
def test_slow_node_is_used_survives_a_short_cut_and_comes_back_after_a_long_one(far: FarNode, tmp_path: Path) -> None:
    with RayCluster(cpus=0, host=HEAD_HOST) as cluster:
        far.start(cluster)
        options = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1,far=1")
        with FaultServer(tmp_path, *options, environment=cluster.environment) as server:
            with load(server) as (counts, wrong):

                def await_pictures(count: int) -> None:
                    wanted = counts[200] + count
                    server.until(lambda: counts[200] >= wanted, PATIENCE_S)

                for delay_s in (0.002, 0.02):
                    far.delay_s = delay_s
                    await_pictures(20)
                far.is_cut = True
                time.sleep(SHORT_CUT_S)  # is the length of the cut
                far.is_cut = False
                await_pictures(20)
                assert set(counts) == {200}, counts
                assert not server.logged("worker died")
                far.is_cut = True
                server.until(lambda: counts[503] > 0, PATIENCE_S)
                assert server.fetch("/v2/health/ready")[0] == 503
                far.is_cut = False
                far.await_end(PATIENCE_S)
                far.start(cluster)
                await_pictures(20)
                assert server.fetch("/v2/health/ready")[0] == 200
            assert not wrong
            assert set(counts) <= {200, 503}, counts
            server.until(lambda: not server.model_status()["running"])
            assert not server.segments()


@pytest.mark.heavy
def test_node_without_the_model_pulls_it_and_shows_how_far_it_is(
    far: FarNode, tmp_path: Path, server: LiveServer
) -> None:
    repository, root = "owner/shapes", tmp_path / "models"
    shutil.copytree(builtin_directory(), tmp_path / "hub" / repository)
    root.mkdir()
    request = {"prompt": "a green circle on a blue background", "seed": 3, "metadata": False}
    with FakeHub(tmp_path / "hub", HEAD_HOST) as hub, RayCluster(cpus=0, host=HEAD_HOST) as cluster:
        pulled = subprocess.run(  # as the front end does it
            [sys.executable, "-m", "ovserve", "pull", repository, "--model_repository_path", str(root)],
            env=os.environ | {"HF_ENDPOINT": hub.url}, check=False, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert pulled.returncode == 0, pulled.stderr
        hub.seen.clear()
        hub.faults.hold = threading.Event()
        far.start(cluster, own=root, HF_ENDPOINT=hub.url)
        common = "threads = 1\nstreams = 2\nmax_batch = 8\n"  # as those of the fixture `server`
        (tmp_path / "c.toml").write_text(
            f'model_repository_path = "{root}"\nready_models = "any"\nray_address = "{cluster.address}"\n'
            f'[[model]]\nsource_model = "{repository}"\nname = "pulled"\npool = "ray"\n'
            f'placement = "cpus=1,far=1"\n{common}[[model]]\nname = "shapes"\npath = "builtin:shapes"\n{common}'
        )
        options = ("--config", str(tmp_path / "c.toml"))
        with FaultServer(tmp_path / "spool", *options, real=True, environment=cluster.environment) as remote:

            def status() -> dict[str, Any]:
                return dict(remote.fetch("/v3/models/pulled")[1])

            remote.until(lambda: "%" in status().get("waits_for", ""), PATIENCE_S)
            assert status()["reason"].startswith("node 198.18.77.2/")
            assert f"pulls {repository}: " in status()["reason"]
            with remote.client() as client:
                refused = remote.generate(client, "a red star", model="pulled")
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
                hub.faults.hold.set()
                remote.until(lambda: status()["ready"], PATIENCE_S)
                made = remote.generate(client, **request, model="pulled")
            with httpx.Client(base_url=server.url, timeout=60) as client:
                known = client.post("/v3/images/generations", json=request)
            assert picture_of(made) == picture_of(known)
            assert hub.downloads()
            assert not [seen.path for seen in hub.seen if "main" in seen.path], "the commit of the front end is pulled"
            assert not remote.logged("worker died")
