"""Where one front end with many workers on a Ray cluster saturates.

    python benchmarks/bench_scale_front_end.py --actors 10 100 --save

The workers are toys on one node; a job takes JOB_S without computing, and twice as many clients as places for jobs ask
in a closed loop, so that the devices are never the limit.

- `rate`: answers a second.
- `cpu`: processor time of the front end, of the bridge, and of the whole machine for one answer. The first two run
  Python in one thread at a time: the reciprocal is what each of them could do with a processor of its own.
- `idle cpu`: processor time a second of front end and bridge while no request comes, for their workers' reports.
- `memory`: of front end and bridge.
- `start`: seconds until all workers are ready.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx

from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer
from tests.live import children_of, resident_bytes
from tests.raycluster import RayCluster

JOB_S = 0.5
PLACES = 2  # jobs that a toy worker runs at once
MOST_CLIENTS = 96
IDLE_S = 10.0
START_LIMIT_S = 900.0
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def machine_cpu_s() -> float:
    """Return the processor time that this machine has spent so far, idle time excluded."""
    fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
    return (sum(map(int, fields)) - int(fields[3]) - int(fields[4])) / _TICKS


def bridge_of(server: FaultServer) -> int:
    """Return the process id of the bridge: the child of the front end with the most memory."""
    return max(children_of(server.process.pid), key=resident_bytes)


def ask(url: str, ended: threading.Event, counts: Counter[int]) -> None:
    """Send one request after the other."""
    with httpx.Client(base_url=url, timeout=120) as client:
        while not ended.is_set():
            reply = client.post("/v1/images/generations", json={"prompt": f"sleep {JOB_S}"})
            counts[reply.status_code] += 1


def measure(result: Result, server: FaultServer, actors: int, seconds: float) -> None:
    """Add the figures of one number of workers."""
    processes = {"front end": server.process.pid, "bridge": bridge_of(server)}
    before = {name: cpu_s(pid) for name, pid in processes.items()}
    time.sleep(IDLE_S)  # is the length of the measurement
    for name, pid in processes.items():
        case = {"actors": actors, "of": name}
        result.add("idle cpu", [(cpu_s(pid) - before[name]) / IDLE_S], unit="", case=case)
    ended, counts = threading.Event(), Counter[int]()
    clients = min(MOST_CLIENTS, 2 * PLACES * actors)
    threads = [threading.Thread(target=ask, args=(server.url, ended, counts)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    server.until(lambda: counts[200] >= clients, START_LIMIT_S)  # the first ones open their connections
    before = {name: cpu_s(pid) for name, pid in processes.items()} | {"machine": machine_cpu_s()}
    done, begun = counts[200], time.perf_counter()
    time.sleep(seconds)  # is the length of the measurement
    done, took_s = counts[200] - done, time.perf_counter() - begun
    after = {name: cpu_s(pid) for name, pid in processes.items()} | {"machine": machine_cpu_s()}
    ended.set()
    for thread in threads:
        thread.join()
    assert set(counts) == {200}, counts
    result.add("rate", [done / took_s], unit="1/s", better="higher", case={"actors": actors, "clients": clients})
    for name in before:
        result.add("cpu", [(after[name] - before[name]) / done], case={"actors": actors, "of": name})
    for name, pid in processes.items():
        result.add("memory", [resident_bytes(pid)], unit="bytes", case={"actors": actors, "of": name})


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[10, 100], help="numbers of workers (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("scale-front-end", collect(builtin_directory()))
    with ExitStack() as stack:
        cluster = stack.enter_context(RayCluster(cpus=0))
        cluster.add(cpus=4)
        remote = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=0.01")
        common = (
            "--log_level",
            "error",
            "--queue_limit",
            "10000",
            "--max_connections",
            "1000",
            "--load_timeout_s",
            "600",
        )
        toys = {"capacity": PLACES, "heartbeat_s": 1}
        for actors in sorted(options.actors):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                with FaultServer(
                    Path(folder), *common, *remote, "--replicas", str(actors), toy_options=toys,
                    environment=cluster.environment,
                ) as server:  # fmt: skip
                    server.until(lambda: server.model_status()["workers"] == actors, START_LIMIT_S)  # noqa: B023
                    result.add("start", [time.perf_counter() - begun], case={"actors": actors})
                    measure(result, server, actors, options.seconds)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
