"""Measure the time from the death of a worker to the next answer, on the built-in model and through the whole server.

    python benchmarks/bench_recovery.py
    python benchmarks/bench_recovery.py --kills 10 --save

Each case starts its own server. A request is sent at the moment of the kill; the time is from the kill to its answer.

none        no worker is killed: the baseline
idle        the only worker is killed while it is idle: a new process has to start, load and warm up
mid-job     the only worker is killed after a quarter of the request's usual time: as above, and the job is repeated
one of two  one of two idle workers is killed: the other worker answers
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.edits import BUILTIN_NAME
from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer

IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
FIELDS = {"model": BUILTIN_NAME, "prompt": "a green circle on a blue background", "strength": "0.7", "seed": "1"}
CASES = {"none": 1, "idle": 1, "mid-job": 1, "one of two": 2}  # case to number of workers
READY_S = 120.0


def send_edit(client: httpx.Client) -> None:
    """Send one edit and read its answer.

    Raises:
        RuntimeError: the status is not 200.
    """
    reply = client.post("/v3/images/edits", data=FIELDS, files={"image": ("a.png", IMAGE.read_bytes())})
    if reply.status_code != 200:
        raise RuntimeError(f"{reply.status_code}: {reply.text}")


def time_edit(client: httpx.Client) -> float:
    """Return the seconds of one edit."""
    started = time.perf_counter()
    send_edit(client)
    return time.perf_counter() - started


def time_recovery(server: FaultServer, client: httpx.Client, case: str, alone_s: float) -> float:
    """Return the seconds from a kill to the next answer; `alone_s`: the usual time of the request."""
    if case == "none":
        return time_edit(client)
    if case != "mid-job":
        started = time.perf_counter()
        server.kill_worker()
        send_edit(client)
        return time.perf_counter() - started
    request = threading.Thread(target=send_edit, args=(client,))
    request.start()
    time.sleep(alone_s / 4)
    started = time.perf_counter()
    server.kill_worker()
    request.join()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="kills in each case (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    from benchmarks.metadata import collect
    from benchmarks.results import Result

    result = Result("recovery", collect(builtin_directory()))
    for case, replicas in CASES.items():
        with tempfile.TemporaryDirectory() as spool:
            arguments = ("--replicas", str(replicas), "--log_level", "warning")
            started = time.perf_counter()
            with FaultServer(Path(spool), *arguments, real=True) as server, server.client(READY_S) as client:
                result.add("start", [time.perf_counter() - started], case={"replicas": replicas})
                send_edit(client)
                alone_s = min(time_edit(client) for _ in range(3))
                for _ in range(options.kills):
                    server.until(lambda: server.model_status()["workers"] == replicas, READY_S)  # noqa: B023 - called at once
                    result.add("recovery", [time_recovery(server, client, case, alone_s)], case={"killed": case})
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
