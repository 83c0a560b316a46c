"""From the death of a worker to the next answer, on the built-in model and over the whole server.

    python benchmarks/bench_recovery.py
    python benchmarks/bench_recovery.py --kills 10 --save

Each case has a server of its own. A request is sent at the moment of the kill; the time is from the kill to its answer.

none        nobody is killed: the same request, the baseline
idle        the only worker is killed while it has nothing to do: the time of a new process, its loading and its warm-up
mid-job     the only worker is killed a quarter of the way into the request: the same, and the request made again
one of two  one of two idle workers is killed: the other one answers
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

if __package__ in (None, ""):  # run as a file: the package is found beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer

IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
FIELDS = {"prompt": "a green circle on a blue background", "strength": "0.7", "seed": "1"}
CASES = {"none": 1, "idle": 1, "mid-job": 1, "one of two": 2}  # and with how many workers
READY_S = 120.0


def ask(client: httpx.Client) -> None:
    """One edit. Raises RuntimeError for any answer but 200."""
    reply = client.post("/v3/images/edits", data=FIELDS, files={"image": ("a.png", IMAGE.read_bytes())})
    if reply.status_code != 200:
        raise RuntimeError(f"{reply.status_code}: {reply.text}")


def timed(client: httpx.Client) -> float:
    """Seconds of one edit."""
    started = time.perf_counter()
    ask(client)
    return time.perf_counter() - started


def recover(server: FaultServer, client: httpx.Client, case: str, alone_s: float) -> float:
    """Seconds from a kill to the next answer."""
    if case == "none":
        return timed(client)
    if case != "mid-job":
        started = time.perf_counter()
        server.kill_worker()
        ask(client)
        return time.perf_counter() - started
    asking = threading.Thread(target=ask, args=(client,))
    asking.start()
    time.sleep(alone_s / 4)
    started = time.perf_counter()
    server.kill_worker()
    asking.join()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, and save when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="in each case")
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
                ask(client)
                alone_s = min(timed(client) for _ in range(3))
                for _ in range(options.kills):
                    server.until(lambda: server.standing()["workers"] == replicas, READY_S)  # noqa: B023 - called at once
                    result.add("recovery", [recover(server, client, case, alone_s)], case={"killed": case})
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
