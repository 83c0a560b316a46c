"""A chaos run: constant load, workers killed at random moments, and a check of every response against the log.

Each request asks for one of a few pictures, selected by its seed. A seed must always give the same picture, no matter
how many workers were killed meanwhile.
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
from tests.live import BUILTIN_NAME

SEEDS = 12
FIELDS = {"model": BUILTIN_NAME, "prompt": "a green circle on a blue background", "strength": "0.7"}
_JOB = re.compile(r"\bjob=(\S+)")


@dataclass
class ChaosRun:
    """The outcome of a chaos run.

    Attributes:
        statuses: number of responses by status code.
        latencies_s: of the responses with status 200.
        kills: number of killed workers.
        retried: ids of jobs that were requeued after the death of a worker, from the log.
        lost: ids of jobs that failed after the death of a second worker, from the log.
        crashed: ids of the requests with the error `worker_crashed`.
        other: status and body of every other error.
        pictures: hashes of the pictures by seed; each seed must have one.
        recoveries_s: time from each kill to the next response.
        model_failed: the log reports that the model failed.
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
        """Check that every response is 200, or 500 if and only if the log shows that two workers died with the job."""
        assert set(self.statuses) <= {200, 500}, self.other
        assert not self.other, self.other
        assert self.crashed == self.lost
        assert self.lost <= self.retried
        assert not self.model_failed
        assert {seed: len(shown) for seed, shown in self.pictures.items()} == dict.fromkeys(self.pictures, 1)


def run_chaos(server: FaultServer, image: Path, *, clients: int, seconds: float, every_s: float, seed: int) -> ChaosRun:
    """Send edits from `clients` clients for `seconds` seconds; kill a random worker every `every_s` seconds."""
    found = ChaosRun()
    lock = threading.Lock()
    end = time.monotonic() + seconds
    response_received = threading.Condition(lock)
    content = image.read_bytes()
    random_worker = random.Random(seed)

    def send_edits(number: int) -> None:
        random_seed = random.Random(number)
        with server.client(timeout_s=120) as client:
            while time.monotonic() < end:
                picture_seed = random_seed.randrange(SEEDS)
                started = time.monotonic()
                reply = client.post(
                    "/v3/images/edits", data={**FIELDS, "seed": str(picture_seed)}, files={"image": ("a.png", content)}
                )
                took_s = time.monotonic() - started
                with response_received:
                    _record(found, reply, picture_seed, took_s)
                    response_received.notify_all()

    threads = [threading.Thread(target=send_edits, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() + every_s < end:
        time.sleep(every_s)
        pids = server.workers()
        if not pids:
            continue
        server.kill_worker(random_worker.choice(pids))
        killed_at = time.monotonic()
        with response_received:
            found.kills += 1
            response_received.wait(60)
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


def _record(run: ChaosRun, reply: httpx.Response, seed: int, took_s: float) -> None:
    run.statuses[reply.status_code] += 1
    if reply.status_code == 200:
        run.latencies_s.append(took_s)
        picture = base64.b64decode(reply.json()["data"][0]["b64_json"])
        run.pictures[seed].add(hashlib.sha256(picture).hexdigest())
    elif reply.status_code == 500 and reply.json()["error"]["code"] == "worker_crashed":
        run.crashed.add(reply.headers["x-request-id"])
    else:
        run.other.append(f"{reply.status_code} {reply.text}")
