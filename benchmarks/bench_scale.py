"""Workers on a Ray cluster of this machine: the cost of the hop, more nodes, and a simulation of many devices.

    python benchmarks/bench_scale.py --rounds 20 --nodes 1 2 3 --save

- `hop`: small edits one after another, by the local pool and by a node, in turns; the prompt makes a toy worker answer
  at once, so that the difference is what the cluster adds.
- `nodes`: requests a second with one toy worker on each node; each job takes JOB_S without computing, so that nodes of
  one machine do not take each other's processors.
- `front end`: its processor time for one request, by its own count, in the same run.
- `simulation`: from these times, the share of all devices that one front end keeps busy. Nothing of that was run.

The nodes are processes of one machine: no figure has a network in it.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx

from benchmarks import stats
from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer
from tests.raycluster import RayCluster

JOB_S = 0.5  # of a job of `nodes`
WORKER_JOBS = 2  # that a toy worker runs at once
JOBS = 24  # for each node
HOPS = 20  # edits of one round
SIMULATED_DEVICES = (10, 100, 1000)
SIMULATED_JOB_S = (0.5, 5.0)
SIMULATED_ROUNDS = 50  # jobs for each device


def simulate(devices: int, job_s: float, front_s: float, hop_s: float, rounds: int = SIMULATED_ROUNDS) -> float:
    """Return the share of time that devices are busy, with one front end in front of them.

    Discrete events. Each device takes one job at a time, of exponentially distributed length. Each job costs the front
    end `front_s`, which it spends for one job after another, and `hop_s` on the way, in which its device waits.
    """
    source = random.Random(devices)
    free = [(0.0, device) for device in range(devices)]  # when each device asks for its next job
    heapq.heapify(free)
    front_free_at = end = busy = 0.0
    for _ in range(devices * rounds):
        asked_at, device = heapq.heappop(free)
        front_free_at = max(front_free_at, asked_at) + front_s
        length = source.expovariate(1 / job_s)
        end = front_free_at + hop_s + length
        busy += length
        heapq.heappush(free, (end, device))
    return busy / (devices * max(at for at, _ in free))


def edits(server: FaultServer, client: httpx.Client, count: int) -> list[float]:
    """Return the seconds of each of several edits."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        assert server.edit(client, "echo x").status_code == 200
        times.append(time.perf_counter() - begun)
    return times


def cpu_s(server: FaultServer) -> float:
    """Return the processor time that the front end has taken so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rate_of(server: FaultServer, jobs: int) -> tuple[float, float]:
    """Return the jobs a second of a closed loop, and the front end's processor time for each."""
    with server.client() as client, ThreadPoolExecutor(jobs) as pool:
        before, begun = cpu_s(server), time.perf_counter()
        done = list(pool.map(lambda _: server.generate(client, f"sleep {JOB_S}").status_code, range(jobs)))
        assert set(done) == {200}
        return jobs / (time.perf_counter() - begun), (cpu_s(server) - before) / jobs


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of `hop` (%(default)s)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3], help="numbers of nodes (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("scale", collect(builtin_directory()))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(RayCluster(cpus=0))
        os.environ.update(cluster.environment)
        common = ("--log_level", "error", "--queue_limit", "10000")
        remote = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1")
        nodes = 0
        for wanted in sorted(options.nodes):
            while nodes < wanted:
                cluster.add(cpus=1)
                nodes += 1
            toys = {"capacity": WORKER_JOBS}
            with FaultServer(
                folder, *common, *remote, "--replicas", str(nodes), toy_options=toys, wait_ready=True
            ) as server:
                server.until(lambda: server.fetch("/v1/status")[1]["models"][0]["workers"] == nodes, 120)  # noqa: B023
                rate, front_s = rate_of(server, JOBS * nodes)
            result.add("rate", [rate], unit="1/s", better="higher", case={"nodes": nodes, "job_s": JOB_S})
            result.add("front end", [front_s], case={"nodes": nodes})
        local = stack.enter_context(FaultServer(folder, *common))
        far = stack.enter_context(FaultServer(folder, *common, *remote))
        servers = {"local": local, "node": far}
        clients = {name: stack.enter_context(server.client()) for name, server in servers.items()}
        for name, server in servers.items():
            edits(server, clients[name], HOPS)  # the first ones are slower
        for number in range(options.rounds):
            for name in servers if number % 2 else reversed(servers):
                result.add("edit", edits(servers[name], clients[name], HOPS), case={"pool": name})
    hop_s = sum(
        sign * stats.estimate(result.find("edit", pool=name).values).value
        for name, sign in (("node", 1), ("local", -1))
    )
    front_s = min(result.find("front end", nodes=count).values[0] for count in options.nodes)
    for devices in SIMULATED_DEVICES:
        for job_s in SIMULATED_JOB_S:
            share = simulate(devices, job_s, front_s, max(0.0, hop_s))
            case = {"devices": devices, "job_s": job_s}
            result.add("simulated share of busy devices", [share], unit="", better="higher", case=case)
    print(result.report())
    print(f"hop: {1000 * hop_s:.2f} ms; the front end takes {1000 * front_s:.2f} ms of a processor for one request")
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
