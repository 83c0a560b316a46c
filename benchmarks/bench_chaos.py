"""Workers killed at random under load, overload, stops: what every client got. A reckoning first, a measurement second.

    python benchmarks/bench_chaos.py
    python benchmarks/bench_chaos.py --seconds 120 --overload-seconds 60 --stops 20 --save

chaos     8 clients, 3 workers of the built-in model, a SIGKILL to one of them every 5 s. Every request must be answered with 200, or
          with 500 `worker_crashed` if and only if the log shows two deaths under it; one seed gives one picture throughout.
overload  clients for ten times what the worker can hold: only 200 and 429; the queue's wait, the memory and what health takes.
          The baseline is health of the same server without load.
stops     SIGTERM at random moments under load: every request that was accepted is answered, and the process ends with 0.

The run ends with a non-zero exit code when any of that does not hold.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

if __package__ in (None, ""):  # run as a file: the package is found beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.metadata import collect
from benchmarks.probe import Prober
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.chaos import run_chaos
from tests.faultserver import FaultServer
from tests.live import resident_bytes

IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
FIELDS = {"prompt": "a green circle on a blue background", "strength": "0.7"}
READY_S = 180.0
HEALTH = "/v2/health/live"
QUEUE = 8
STEADY_S = 30.0  # of overload before memory is looked at, or a third of the run where that is less


def chaos(result: Result, seconds: float) -> None:
    """The chaos run. Raises AssertionError when a request was lost."""
    with (
        tempfile.TemporaryDirectory() as spool,
        FaultServer(Path(spool), "--replicas", "3", "--log_level", "warning", real=True) as server,
    ):
        server.until(lambda: server.standing()["workers"] == 3, READY_S)
        before = server.holdings()
        found = run_chaos(server, IMAGE, clients=8, seconds=seconds, every_s=5.0, seed=1)
        server.until(lambda: server.standing()["workers"] == 3, READY_S)
        server.until_settled(before)
        found.check()
    counts = {
        "kills": found.kills,
        "answered 200": found.statuses[200],
        "answered 500 worker_crashed": len(found.crashed),
        "any other answer": len(found.other),
        "jobs given once more": len(found.retried),
        "jobs with two deaths": len(found.lost),
        "pictures that differ for one seed": sum(len(shown) - 1 for shown in found.pictures.values()),
    }
    for what, count in counts.items():
        result.add("count", [count], unit="", better="none", case={"run": "chaos", "of": what})
    result.add("latency", found.latencies_s, case={"run": "chaos"})
    result.add("recovery", found.recoveries_s, case={"run": "chaos"})


def overload(result: Result, seconds: float) -> None:
    """Ten times the capacity. Raises AssertionError for any answer but 200 and 429."""
    statuses: collections.Counter[int] = collections.Counter()
    waits: list[float] = []
    with (
        tempfile.TemporaryDirectory() as spool,
        FaultServer(Path(spool), "--queue_limit", str(QUEUE), "--log_level", "warning", real=True) as server,
        server.client(READY_S) as client,
    ):
        content = IMAGE.read_bytes()
        with Prober(server.url, HEALTH) as prober:
            time.sleep(min(10.0, seconds))
        result.add("health", [one.latency_s for one in prober.probes], case={"load": "none"})
        until = time.monotonic() + seconds

        def flood() -> None:
            while time.monotonic() < until:
                reply = client.post("/v3/images/edits", data=FIELDS, files={"image": ("a.png", content)})
                statuses[reply.status_code] += 1
                if reply.status_code == 200:
                    waits.append(float(re.findall(r"queue;dur=([0-9.]+)", reply.headers["server-timing"])[0]) / 1000)
                else:
                    time.sleep(0.2)  # a fifth of the least that was asked for: overload all the same

        clients = 10 * (QUEUE + 3)
        threads = [threading.Thread(target=flood) for _ in range(clients)]
        with Prober(server.url, HEALTH) as prober:
            for thread in threads:
                thread.start()
            time.sleep(min(STEADY_S, seconds / 3))
            first = resident_bytes(server.process.pid)
            time.sleep(max(0.0, until - time.monotonic()))
            grown = resident_bytes(server.process.pid) - first
        for thread in threads:
            thread.join()
    if not all(one.is_healthy for one in prober.probes):
        raise AssertionError("a health check failed")
    if set(statuses) != {200, 429}:
        raise AssertionError(f"answers: {dict(statuses)}")
    for status, count in sorted(statuses.items()):
        result.add("count", [count], unit="", better="none", case={"run": "overload", "of": f"answered {status}"})
    result.add("queue wait", waits, case={"run": "overload", "queue": QUEUE})
    result.add("health", [one.latency_s for one in prober.probes], case={"load": f"{clients} clients"})
    result.add("memory growth", [grown], unit="bytes", case={"run": "overload"})


def stops(result: Result, count: int) -> None:
    """SIGTERM at random moments. Raises AssertionError when an accepted request was not answered."""
    chance = random.Random(2)
    answered: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        with tempfile.TemporaryDirectory() as spool:
            outcomes = one_stop(Path(spool), chance.random() * 2.0)
            if os.listdir(spool):
                raise AssertionError("segments were left")
        answered.update(outcomes)
    for what, number in sorted(answered.items()):
        result.add("count", [number], unit="", better="none", case={"run": f"{count} stops", "of": what})


def one_stop(spool: Path, moment_s: float) -> list[str]:
    """Load a server, send SIGTERM at a moment, and compare what its clients got with what its log says it accepted."""
    outcomes: list[str] = []
    over = threading.Event()
    with FaultServer(spool, real=True) as server:

        def ask(client: httpx.Client) -> None:
            while not over.is_set():
                try:
                    reply = client.post("/v3/images/edits", data=FIELDS, files={"image": ("a.png", IMAGE.read_bytes())})
                    outcomes.append(f"answered {reply.status_code}")
                except httpx.TransportError:
                    outcomes.append("not accepted")
                    over.set()

        with server.client(READY_S) as client:
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            server.until(lambda: bool(outcomes), READY_S)
            time.sleep(moment_s)
            server.signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
        code = server.wait()
    accepted = [line.split("/v3/images/edits ")[1].split()[0] for line in server.logged("POST /v3/images/edits")]
    given = [outcome.removeprefix("answered ") for outcome in outcomes if outcome.startswith("answered")]
    # Every request that was read is logged, and its client has the answer that stands there. The others were not accepted.
    if code != 0 or sorted(accepted) != sorted(given) or not set(given) <= {"200", "503"}:
        raise AssertionError(f"exit code {code}; accepted {accepted}; given {given}")
    return outcomes


def main() -> None:
    """Run, print, and save when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the chaos run")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("chaos", collect(builtin_directory()))
    try:
        if options.seconds:
            chaos(result, options.seconds)
        if options.overload_seconds:
            overload(result, options.overload_seconds)
        if options.stops:
            stops(result, options.stops)
    finally:
        print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
