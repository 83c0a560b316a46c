"""Load on a server whose workers are on a cluster, while parts of the cluster are lost: what each client receives.

Each request asks for one of a few pictures, selected by its seed, which a server with the local pool has made before. A
reply with status 200 and other bytes is a false one.
"""

from __future__ import annotations

import base64
import collections
import functools
import hashlib
import itertools
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.faultserver import FaultServer
from tests.live import BUILTIN_NAME
from tests.raycluster import RayCluster

__all__ = ["CLIENTS", "ClusterRun", "Phase", "run_cluster_chaos"]

CLIENTS = 8
SEEDS = 6
FIELDS = {
    "model": BUILTIN_NAME,
    "prompt": "a green circle on a blue background",
    "strength": "0.7",
    "metadata": "false",
}
WORKERS = 2
STEADY = 16  # pictures that show that the service is back
REFUSED_PAUSE_S = 0.25  # of a client after a 503, so that 503s do not outnumber all other answers
PATIENCE_S = 240.0  # Ray gives up a head after a minute, and then workers are placed and warmed up
_JOB = re.compile(r"\bjob=(\S+)")


@dataclass
class Phase:
    """What clients have received during one kind of fault; a reply belongs to the phase in which it arrives.

    Attributes:
        statuses: number of replies by status code.
        false: what is wrong with a reply: another picture than the seed's, an error that the rules do not know.
        crashed: ids of the requests with the error `worker_crashed`.
        faults: number of faults that were made.
        recoveries_s: time from each fault to the next reply with status 200.
        seconds: length of the phase.
    """

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    false: list[str] = field(default_factory=list)
    crashed: set[str] = field(default_factory=set)
    faults: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class ClusterRun:
    """The outcome of a run.

    Attributes:
        phases: by name, in order.
        unanswered: requests whose connection ended without a reply.
        retried: ids of jobs that were requeued after the death of a worker, from the log.
        lost: ids of jobs that failed after the death of a second worker, from the log.
        segments: what is left in the spool.
        model_failed: the log reports that the model failed: what a cluster loses is no crash loop.
    """

    phases: dict[str, Phase] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)
    retried: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    segments: list[str] = field(default_factory=list)
    model_failed: bool = False

    def check(self) -> None:
        """Check that each request was answered with its picture, 503 with Retry-After, or 500 after two deaths."""
        assert not self.unanswered, self.unanswered
        for name, phase in self.phases.items():
            assert not phase.false, (name, phase.false)
            assert set(phase.statuses) <= {200, 500, 503}, (name, phase.statuses)
            assert phase.statuses[200] >= STEADY, (name, phase.statuses)
        assert set().union(*(phase.crashed for phase in self.phases.values())) == self.lost
        assert self.lost <= self.retried
        assert not self.phases["no faults"].statuses.keys() - {200}
        assert not self.segments, "segments are left"
        assert not self.model_failed


class _Load:
    """The clients, and the phase that their replies belong to."""

    def __init__(self, server: FaultServer, image: bytes, known: dict[int, str], run: ClusterRun) -> None:
        self._server = server
        self._image = image
        self._known = known
        self._run = run
        self._phase = Phase()
        self._has_ended = threading.Event()
        self._replied = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def start(self) -> None:
        """Start the clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the last reply of each client."""
        self._has_ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Count the replies as those of a phase; it ends when the service was there for STEADY pictures."""
        begun = time.monotonic()
        with self._replied:
            phase = self._phase = self._run.phases[name] = Phase()
        yield phase
        self.await_pictures(STEADY)
        phase.seconds = time.monotonic() - begun

    def await_pictures(self, count: int = 1) -> None:
        """Wait for this many further replies with status 200."""
        with self._replied:
            phase, wanted = self._phase, self._phase.statuses[200] + count
            if not self._replied.wait_for(lambda: phase.statuses[200] >= wanted, PATIENCE_S):
                raise AssertionError(f"no service: {phase.statuses}\n" + "\n".join(self._server.log[-40:]))

    def await_refusal(self) -> None:
        """Wait for a reply with status 503."""
        with self._replied:
            phase = self._phase
            assert self._replied.wait_for(lambda: phase.statuses[503] > 0, PATIENCE_S), phase.statuses

    def fault(self, phase: Phase, make: Callable[[], object]) -> None:
        """Make a fault, and note how long it takes until the next picture."""
        begun = time.monotonic()
        make()
        phase.faults += 1
        self.await_pictures()
        phase.recoveries_s.append(time.monotonic() - begun)

    def _ask(self, number: int) -> None:
        with self._server.client(timeout_s=PATIENCE_S) as client:
            for turn in itertools.count(number):
                if self._has_ended.is_set():
                    return
                seed = turn % SEEDS
                try:
                    reply = edit(client, self._image, seed)
                except httpx.TransportError as error:
                    self._run.unanswered.append(repr(error))
                    return
                with self._replied:
                    self._note(self._phase, reply, seed)
                    self._replied.notify_all()
                if reply.status_code == 503:
                    self._has_ended.wait(REFUSED_PAUSE_S)

    def _note(self, phase: Phase, reply: httpx.Response, seed: int) -> None:
        phase.statuses[reply.status_code] += 1
        if reply.status_code == 200:
            if hash_of(reply) != self._known[seed]:
                phase.false.append(f"another picture for seed {seed}")
        elif reply.status_code == 500 and reply.json()["error"]["code"] == "worker_crashed":
            phase.crashed.add(reply.headers["x-request-id"])
        elif reply.status_code != 503 or "retry-after" not in reply.headers:
            phase.false.append(f"{reply.status_code} {reply.text}")


def edit(client: httpx.Client, image: bytes, seed: int) -> httpx.Response:
    """Send an edit."""
    return client.post("/v3/images/edits", data={**FIELDS, "seed": str(seed)}, files={"image": ("a.png", image)})


def hash_of(reply: httpx.Response) -> str:
    """Return the hash of the picture of a reply."""
    return hashlib.sha256(base64.b64decode(reply.json()["data"][0]["b64_json"])).hexdigest()


def solo_pictures(folder: Path, image: bytes) -> dict[int, str]:
    """Return the hash of each seed's picture, made one after another by a server with the local pool."""
    with FaultServer(folder, "--log_level", "warning", real=True) as server, server.client() as client:
        return {seed: hash_of(edit(client, image, seed)) for seed in range(SEEDS)}


def run_cluster_chaos(folder: Path, image: Path, port: int, *, kills: int, every_s: float, seed: int = 1) -> ClusterRun:
    """Run CLIENTS clients through every kind of fault.

    Args:
        folder: for spools.
        image: that is edited.
        port: a free one, for the head: the second cluster has the address of the first.
        kills: number of actors that are killed.
        every_s: time between two of them.
        seed: of the choice of actors.
    """
    run, content = ClusterRun(), image.read_bytes()
    for name in ("solo", "spool"):
        folder.joinpath(name).mkdir()
    known = solo_pictures(folder / "solo", content)
    clusters = [RayCluster(cpus=0, port=port)]
    environment = clusters[0].environment
    options = ("--pool", "ray", "--ray_address", clusters[0].address, "--replicas", str(WORKERS))
    try:
        nodes = [clusters[0].add(cpus=1) for _ in range(WORKERS)]
        with FaultServer(
            folder / "spool", *options, "--placement", "cpus=1", real=True, environment=environment
        ) as server:
            await_workers(server)
            load = _Load(server, content, known, run)
            load.start()
            try:
                with load.phase("no faults"):
                    load.await_pictures(2 * STEADY)
                with load.phase("actors killed") as phase:
                    kill_actors(load, phase, clusters[0], kills, every_s, random.Random(seed))
                await_workers(server)
                with load.phase("node killed, another added") as phase:
                    load.fault(phase, lambda: clusters[0].remove(nodes[0]))
                    clusters[0].add(cpus=1)
                    await_workers(server)
                with load.phase("cluster created anew") as phase:
                    clusters[0].stop()
                    load.await_refusal()
                    clusters.append(RayCluster(cpus=0, port=port, environment=environment))
                    load.fault(phase, lambda: [clusters[1].add(cpus=1) for _ in range(WORKERS)])
                    await_workers(server)
            finally:
                load.stop()
            server.until(lambda: not server.model_status()["running"])
            run.segments = server.segments()
            run.model_failed = bool(server.logged("model failed"))
            for line in list(server.log):
                if match := _JOB.search(line):
                    if "worker died with a job; job requeued" in line:
                        run.retried.add(match[1])
                    elif "second worker died with a job; job failed" in line:
                        run.lost.add(match[1])
    finally:
        for cluster in clusters:
            cluster.stop()
    return run


def kill_actors(
    load: _Load, phase: Phase, cluster: RayCluster, kills: int, every_s: float, source: random.Random
) -> None:
    """Kill a random actor, again and again."""
    for _ in range(kills):
        next_at = time.monotonic() + every_s
        if actors := cluster.actors():
            load.fault(phase, functools.partial(os.kill, source.choice(actors), signal.SIGKILL))
        time.sleep(max(0.0, next_at - time.monotonic()))


def await_workers(server: FaultServer) -> None:
    """Wait until all workers are ready."""
    server.until(lambda: server.model_status()["workers"] == WORKERS, PATIENCE_S)
