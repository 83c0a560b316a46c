"""Measure five models on a memory budget for two: answers, memory, loads, and how long a cold request waits.

    python benchmarks/bench_residency.py
    python benchmarks/bench_residency.py --seconds 120 --clients 8 --save

The models are five copies of the built-in one under other names, so each has its own workers. The budget is what the
server takes, and two and a half times what one worker was measured to take.

load alone       an operator loads a model while the server does nothing else
cold request     a request for a model that is not loaded, while the server does nothing else: its time in the queue
mixed load       clients send edits to models at random, each without a pause; memory is the sum of the proportional
                 set sizes of the whole process tree, read every 100 ms by the benchmark itself
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovserve.models.profile import builtin_directory
from ovserve.wire.local.processes import children_of, proportional_bytes
from tests.faultserver import FaultServer
from tests.live import BUILTIN_PATH

NAMES = [f"m{number}" for number in range(5)]
IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
ADMIN = {"authorization": "Bearer sk-admin"}
WAIT_S = 600.0
SAMPLE_S = 0.1
WORKERS = 2.5  # for which the budget has room: two, and what one more takes while it is being measured


def configure(folder: Path, budget: int) -> Path:
    """Write the configuration; return its path."""
    lines = [f"memory_budget_bytes = {budget}"]
    for name in NAMES:
        values = {"name": name, "path": BUILTIN_PATH, "load": "lazy", "keep_alive_s": -1}
        values |= {"streams": 1, "threads": 1, "max_batch": 4}
        lines += ["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder / "config.toml"
    path.write_text("\n".join(lines))
    return path


def tree_bytes(pid: int) -> int:
    """Return the proportional set sizes of a process and everything below it."""
    return proportional_bytes(pid) + sum(map(tree_bytes, children_of(pid)))


def queue_s(reply: httpx.Response) -> float:
    """Return the seconds that the request of a reply waited in the queue."""
    found = re.search(r"queue;dur=([0-9.]+)", reply.headers["server-timing"])
    return float(found[1]) / 1000 if found else 0.0


def edit(client: httpx.Client, name: str, seed: int = 1) -> httpx.Response:
    """Send one edit."""
    fields = {
        "model": name,
        "prompt": "a green circle",
        "strength": "0.7",
        "seed": str(seed),
        "num_inference_steps": "4",
    }
    return client.post("/v3/images/edits", data=fields, files={"image": ("a.png", IMAGE.read_bytes())})


def change(client: httpx.Client, name: str, verb: str) -> float:
    """Load or unload a model; return the seconds."""
    started = time.perf_counter()
    reply = client.post(f"/v1/models/{name}/{verb}?wait_s={WAIT_S}", headers=ADMIN)
    reply.raise_for_status()
    return time.perf_counter() - started


def figure(client: httpx.Client, name: str) -> float:
    """Return the sum of a metric over its labels."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}(\{{| )", line))


class Load:
    """Clients that send edits to random models until the time is over."""

    def __init__(self, server: FaultServer, clients: int, seconds: float) -> None:
        self.statuses: Counter[int] = Counter()
        self.waits_s: list[float] = []
        self.latencies_s: list[float] = []
        self.peaks: list[int] = []
        self._server = server
        self._end = time.monotonic() + seconds
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        self._threads.append(threading.Thread(target=self._sample))

    def run(self) -> None:
        """Send until the end, and wait for the last replies."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        chosen = random.Random(number)
        with self._server.client(WAIT_S) as client:
            while time.monotonic() < self._end:
                started = time.perf_counter()
                reply = edit(client, chosen.choice(NAMES), number)
                self.latencies_s.append(time.perf_counter() - started)
                self.statuses[reply.status_code] += 1
                if reply.is_success:
                    self.waits_s.append(queue_s(reply))

    def _sample(self) -> None:
        while time.monotonic() < self._end:
            self.peaks.append(tree_bytes(self._server.process.pid))
            time.sleep(SAMPLE_S)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the mixed load (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="of the mixed load (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="loads alone and cold requests (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    from benchmarks.metadata import collect
    from benchmarks.results import Result

    result = Result("residency", collect(builtin_directory()))
    with tempfile.TemporaryDirectory() as folder:
        environment = {"CACHE_DIRECTORY": f"{folder}/cache"}

        def start(budget: int) -> FaultServer:
            config = configure(Path(folder), budget)
            arguments = ("--config", str(config), "--admin_key", "sk-admin", "--log_level", "warning")
            return FaultServer(Path(folder) / "spool", *arguments, real=True, environment=environment)

        with start(0) as server, server.client(WAIT_S) as client:
            result.add("load, nothing in the cache", [change(client, NAMES[0], "load")])
            edit(client, NAMES[0]).raise_for_status()
            time.sleep(1.5)  # until both have been measured
            worker, total = figure(client, "ovserve_model_memory_bytes"), figure(client, "ovserve_memory_bytes")
            change(client, NAMES[0], "unload")
        budget = int(total - worker + WORKERS * worker)
        with start(budget) as server, server.client(WAIT_S) as client:
            for _ in range(options.repetitions):
                result.add("load alone", [change(client, NAMES[0], "load")])
                change(client, NAMES[0], "unload")
                reply = edit(client, NAMES[0])
                reply.raise_for_status()
                result.add("cold request, time in the queue", [queue_s(reply)])
                change(client, NAMES[0], "unload")
            load = Load(server, options.clients, options.seconds)
            load.run()
            result.add("requests", [sum(load.statuses.values())], unit="", better="higher")
            result.add("requests not answered with 200", [sum(load.statuses.values()) - load.statuses[200]], unit="")
            result.add("budget", [budget], unit="bytes", better="none")
            result.add("memory of the process tree, peak", [max(load.peaks)], unit="bytes")
            result.add("loads", [figure(client, "ovserve_model_loads_total")], unit="", better="none")
            result.add("unloads", [figure(client, "ovserve_model_unloads_total")], unit="", better="none")
            result.add("time in the queue under load", load.waits_s)
            result.add("latency under load", load.latencies_s)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
