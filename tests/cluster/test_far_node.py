"""A node behind a slow network, in a namespace of its own: delays of 2 and 20 ms, cut off, and brought back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.farnode import HEAD_HOST, FarNode, missing
from tests.faultserver import FaultServer, picture_of
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
