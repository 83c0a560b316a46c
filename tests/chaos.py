"""A chaos run: steady clients, workers killed at random moments, and a reckoning of every request against the log.

Each request asks for one of a few pictures, known by its seed; whatever happened to the workers in between, one seed has one picture.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import random
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.faultserver import FaultServer

SEEDS = 12
FIELDS = {"prompt": "a green circle on a blue background", "strength": "0.7"}
_JOB = re.compile(r"\bjob=(\S+)")


@dataclass
class Reckoning:
    """What became of a chaos run.

    Attributes:
        statuses: how many requests were answered with each status.
        latencies_s: of the requests answered with 200.
        kills: how many workers were killed.
        retried, lost: ids of the jobs that the log shows with one death and with two.
        crashed: ids of the requests answered with `worker_crashed`.
        other: bodies of every answer that is neither.
        pictures: how many different pictures each seed gave: one.
        recoveries_s: from each kill to the next answer.
    """

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    latencies_s: list[float] = field(default_factory=list)
    kills: int = 0
    retried: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    crashed: set[str] = field(default_factory=set)
    other: list[str] = field(default_factory=list)
    pictures: dict[int, set[str]] = field(default_factory=lambda: collections.defaultdict(set))
    recoveries_s: list[float] = field(default_factory=list)
    model_failed: bool = False

    def check(self) -> None:
        """Every accepted request was answered with 200, or with 500 if and only if the log shows two deaths under it."""
        assert set(self.statuses) <= {200, 500}, self.other
        assert not self.other, self.other
        assert self.crashed == self.lost
        assert self.lost <= self.retried
        assert not self.model_failed
        assert {seed: len(shown) for seed, shown in self.pictures.items()} == dict.fromkeys(self.pictures, 1)


def run_chaos(
    server: FaultServer, image: Path, *, clients: int, seconds: float, every_s: float, seed: int
) -> Reckoning:
    """Ask with `clients` at once for so long, and kill a worker chosen by chance every `every_s` seconds."""
    found = Reckoning()
    lock = threading.Lock()
    until = time.monotonic() + seconds
    answered = threading.Condition(lock)
    content = image.read_bytes()
    chance = random.Random(seed)

    def ask(number: int) -> None:
        picks = random.Random(number)
        with server.client(timeout_s=120) as client:
            while time.monotonic() < until:
                pick = picks.randrange(SEEDS)
                started = time.monotonic()
                reply = client.post(
                    "/v3/images/edits", data={**FIELDS, "seed": str(pick)}, files={"image": ("a.png", content)}
                )
                took_s = time.monotonic() - started
                with answered:
                    _note(found, reply, pick, took_s)
                    answered.notify_all()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() + every_s < until:
        time.sleep(every_s)
        pids = server.workers()
        if not pids:
            continue
        server.kill_worker(chance.choice(pids))
        killed_at = time.monotonic()
        with answered:
            found.kills += 1
            answered.wait(60)
            found.recoveries_s.append(time.monotonic() - killed_at)
    for thread in threads:
        thread.join()
    for line in list(server.log):
        if match := _JOB.search(line):
            if "worker died with a job; job requeued" in line:
                found.retried.add(match[1])
            elif "second worker died with a job; job failed" in line:
                found.lost.add(match[1])
    found.model_failed = bool(server.logged("model failed"))
    return found


def _note(found: Reckoning, reply: httpx.Response, pick: int, took_s: float) -> None:
    found.statuses[reply.status_code] += 1
    if reply.status_code == 200:
        found.latencies_s.append(took_s)
        picture = base64.b64decode(reply.json()["data"][0]["b64_json"])
        found.pictures[pick].add(hashlib.sha256(picture).hexdigest())
    elif reply.status_code == 500 and reply.json()["error"]["code"] == "worker_crashed":
        found.crashed.add(reply.headers["x-request-id"])
    else:
        found.other.append(f"{reply.status_code} {reply.text}")
