"""Check and measure what clients receive while workers are killed, while the queue is full, and while the server stops.

    python benchmarks/bench_chaos.py
    python benchmarks/bench_chaos.py --seconds 120 --overload-seconds 60 --stops 20 --save

chaos     8 clients, 3 workers of the built-in model, SIGKILL to one worker every 5 s. Every request must be answered
          with 200, or with 500 `worker_crashed` if and only if the log shows two worker deaths for it; one seed must
          always give one picture.
overload  Ten times as many clients as the worker can hold: every answer must be 200 or 429. Measured: time in the
          queue, memory, latency of the health check. The baseline is the health check of the same server without load.
stops     SIGTERM at random moments under load: every accepted request must be answered, and the exit code must be 0.

The exit code is not 0 if one of these checks fails.
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

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.edits import BUILTIN_NAME
from benchmarks.metadata import collect
from benchmarks.probe import Prober
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.chaos import run_chaos
from tests.faultserver import FaultServer
from tests.live import resident_bytes

IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
FIELDS = {"model": BUILTIN_NAME, "prompt": "a green circle on a blue background", "strength": "0.7"}
READY_S = 180.0
HEALTH = "/v2/health/live"
QUEUE = 8
STEADY_S = 30.0  # of overload before the first look at memory; a third of the run if that is shorter


def chaos(result: Result, seconds: float) -> None:
    """Kill workers at random under load.

    Raises:
        AssertionError: a request was lost.
    """
    with (
        tempfile.TemporaryDirectory() as spool,
        FaultServer(Path(spool), "--replicas", "3", "--log_level", "warning", real=True) as server,
    ):
        server.until(lambda: server.model_status()["workers"] == 3, READY_S)
        before = server.resources()
        run = run_chaos(server, IMAGE, clients=8, seconds=seconds, every_s=5.0, seed=1)
        server.until(lambda: server.model_status()["workers"] == 3, READY_S)
        server.until_released(before)
        run.check()
    counts = {
        "kills": run.kills,
        "answered 200": run.statuses[200],
        "answered 500 worker_crashed": len(run.crashed),
        "any other answer": len(run.other),
        "jobs given once more": len(run.retried),
        "jobs with two deaths": len(run.lost),
        "pictures that differ for one seed": sum(len(shown) - 1 for shown in run.pictures.values()),
    }
    for label, count in counts.items():
        result.add("count", [count], unit="", better="none", case={"run": "chaos", "of": label})
    result.add("latency", run.latencies_s, case={"run": "chaos"})
    result.add("recovery", run.recoveries_s, case={"run": "chaos"})


def overload(result: Result, seconds: float) -> None:
    """Send ten times as many requests as the server can hold.

    Raises:
        AssertionError: an answer was neither 200 nor 429, or a health check failed.
    """
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
        result.add("health", [probe.latency_s for probe in prober.probes], case={"load": "none"})
        end = time.monotonic() + seconds

        def send_until_end() -> None:
            while time.monotonic() < end:
                reply = client.post("/v3/images/edits", data=FIELDS, files={"image": ("a.png", content)})
                statuses[reply.status_code] += 1
                if reply.status_code == 200:
                    waits.append(float(re.findall(r"queue;dur=([0-9.]+)", reply.headers["server-timing"])[0]) / 1000)
                else:
                    time.sleep(0.2)  # a fifth of the shortest Retry-After, so the overload continues

        clients = 10 * (QUEUE + 3)
        threads = [threading.Thread(target=send_until_end) for _ in range(clients)]
        with Prober(server.url, HEALTH) as prober:
            for thread in threads:
                thread.start()
            time.sleep(min(STEADY_S, seconds / 3))
            first = resident_bytes(server.process.pid)
            time.sleep(max(0.0, end - time.monotonic()))
            grown = resident_bytes(server.process.pid) - first
        for thread in threads:
            thread.join()
    if not all(probe.is_healthy for probe in prober.probes):
        raise AssertionError("a health check failed")
    if set(statuses) != {200, 429}:
        raise AssertionError(f"answers: {dict(statuses)}")
    for status, count in sorted(statuses.items()):
        result.add("count", [count], unit="", better="none", case={"run": "overload", "of": f"answered {status}"})
    result.add("queue wait", waits, case={"run": "overload", "queue": QUEUE})
    result.add("health", [probe.latency_s for probe in prober.probes], case={"load": f"{clients} clients"})
    result.add("memory growth", [grown], unit="bytes", case={"run": "overload"})


def stops(result: Result, count: int) -> None:
    """Send SIGTERM at random moments under load.

    Raises:
        AssertionError: an accepted request was not answered, the exit code is not 0, or spool segments are left.
    """
    rng = random.Random(2)
    answered: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        with tempfile.TemporaryDirectory() as spool:
            outcomes = stop_under_load(Path(spool), rng.random() * 2.0)
            if os.listdir(spool):
                raise AssertionError("spool segments are left after the stop")
        answered.update(outcomes)
    for label, number in sorted(answered.items()):
        result.add("count", [number], unit="", better="none", case={"run": f"{count} stops", "of": label})


def stop_under_load(spool: Path, delay_s: float) -> list[str]:
    """Load a server, send SIGTERM after a delay, and compare the answers of the clients with the server's log."""
    outcomes: list[str] = []
    stopped = threading.Event()
    with FaultServer(spool, real=True) as server:

        def send_edits(client: httpx.Client) -> None:
            while not stopped.is_set():
                try:
                    reply = client.post("/v3/images/edits", data=FIELDS, files={"image": ("a.png", IMAGE.read_bytes())})
                    outcomes.append(f"answered {reply.status_code}")
                except httpx.TransportError:
                    outcomes.append("not accepted")
                    stopped.set()

        with server.client(READY_S) as client:
            threads = [threading.Thread(target=send_edits, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            server.until(lambda: bool(outcomes), READY_S)
            time.sleep(delay_s)
            server.signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
        code = server.wait()
    accepted = [line.split("/v3/images/edits ")[1].split()[0] for line in server.logged("POST /v3/images/edits")]
    received = [outcome.removeprefix("answered ") for outcome in outcomes if outcome.startswith("answered")]
    # The server logs every request that it has read, so the clients must have received exactly the logged answers.
    if code != 0 or sorted(accepted) != sorted(received) or not set(received) <= {"200", "503"}:
        raise AssertionError(f"exit code {code}; logged answers {accepted}; received answers {received}")
    return outcomes


def main() -> None:
    """Run the checks, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="length of the chaos run; 0: skip it (%(default)s)"
    )
    parser.add_argument(
        "--overload-seconds", type=float, default=60.0, help="length of the overload run; 0: skip it (%(default)s)"
    )
    parser.add_argument("--stops", type=int, default=20, help="number of stops under load; 0: skip them (%(default)s)")
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
