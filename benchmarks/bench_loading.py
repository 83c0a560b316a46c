"""Measure how long a model takes to load, cold and from the cache, and what a second replica on the CPU shares.

    python -m benchmarks.bench_loading
    python -m benchmarks.bench_loading --model sd15=/srv/models/sd15 --model sd15-int8=/srv/models/sd15-int8 --save

load, nothing in the cache    an operator loads the model while the server does nothing else; the files were read before
load, from the cache          the same again, in a new process of the worker
answer after an unload        a whole edit of one step by a client, whose model is not loaded: loading, and the edit
memory of a worker            proportional set size (PSS) of its process after an edit, with one replica and with two;
                              shared pages count half in each of two. Private pages are its own alone. Two are left out
                              where the machine has no memory for them

Time and memory depend on shapes, not on the values of the weights, so random models do (`peers/make_sd15.py`,
`peers/make_sdxl.py`; `peers/compress.py` for int8).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.engines.stepwise.memory import available_bytes
from ovserve.models.profile import builtin_directory
from ovserve.models.weights import weights_bytes
from tests.faultserver import FaultServer
from tests.live import BUILTIN_PATH

NAME = "model"
IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
ADMIN = {"authorization": "Bearer sk-admin"}
WAIT_S = 1200.0
SIDE_PX = 256  # of the edits: small, because loading is measured


def configure(folder: Path, path: str, replicas: int) -> Path:
    """Write the configuration of one lazy model; return its path."""
    values: dict[str, object] = {"name": NAME, "path": path, "load": "lazy", "keep_alive_s": -1, "replicas": replicas}
    lines = ["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    config = folder / f"config-{replicas}.toml"
    config.write_text(f"default_timeout_s = {WAIT_S:g}\n" + "\n".join(lines))
    return config


def edit(client: httpx.Client) -> float:
    """Send an edit of one step; return the seconds until the answer."""
    started = time.perf_counter()
    fields = {"model": NAME, "prompt": "a", "strength": "1", "num_inference_steps": "1", "size": f"{SIDE_PX}x{SIDE_PX}"}
    client.post("/v3/images/edits", data=fields, files={"image": ("a.png", IMAGE.read_bytes())}).raise_for_status()
    return time.perf_counter() - started


def change(client: httpx.Client, verb: str) -> float:
    """Load or unload the model; return the seconds."""
    started = time.perf_counter()
    client.post(f"/v1/models/{NAME}/{verb}?wait_s={WAIT_S}", headers=ADMIN).raise_for_status()
    return time.perf_counter() - started


def read_files(directory: Path) -> None:
    """Read the weight files once, so that no run is the first to read them from the disk."""
    for path in directory.rglob("*.bin"):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def memory_of(pid: int) -> tuple[int, int]:
    """Return proportional and private memory of a process in bytes."""
    found = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found["Pss"], found["Private_Clean"] + found["Private_Dirty"]


def measure(result: Result, name: str, path: str, repetitions: int) -> None:
    """Add the series of one model to a result."""
    directory = builtin_directory() if path == BUILTIN_PATH else Path(path)
    case = {"model": name}
    read_files(directory)
    result.add("weight files", [weights_bytes(directory)], unit="bytes", better="none", case=case)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def start(replicas: int) -> FaultServer:
            config = configure(folder, path, replicas)
            arguments = ("--config", str(config), "--admin_key", "sk-admin", "--log_level", "warning")
            environment = {"CACHE_DIRECTORY": f"{folder}/cache"}
            return FaultServer(folder / "spool", *arguments, real=True, environment=environment)

        with start(1) as server, server.client(WAIT_S) as client:
            result.add("load, nothing in the cache", [change(client, "load")], case=case)
            change(client, "unload")
            for _ in range(repetitions):
                result.add("load, from the cache", [change(client, "load")], case=case)
                change(client, "unload")
                result.add("answer after an unload", [edit(client)], case=case)
                result.add("edit of one step, loaded", [edit(client)], case=case)
                measured = [memory_of(pid) for pid in server.workers()]
                change(client, "unload")
        _add_memory(result, measured, name, 1)
        if 2 * max(private for _, private in measured) > available_bytes():
            print(f"{name}: there is no memory for a second replica", flush=True)
            return
        with start(2) as server, server.client(WAIT_S) as client:
            change(client, "load")
            while sum(each["ready"] for each in client.get("/v1/status", headers=ADMIN).json()["workers"]) < 2:
                time.sleep(0.2)
            with ThreadPoolExecutor(8) as pool:  # so many at once that both replicas get some
                list(pool.map(lambda _: edit(client), range(16)))
            measured = [memory_of(pid) for pid in server.workers()]
        _add_memory(result, measured, name, 2)


def _add_memory(result: Result, measured: Sequence[tuple[int, int]], name: str, replicas: int) -> None:
    case = {"model": name, "replicas": replicas}
    for title, place in (("memory of a worker", 0), ("private memory of a worker", 1)):
        values = [each[place] for each in measured]
        result.add(title, values, unit="bytes", case=case)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY", help="further models")
    parser.add_argument("--repetitions", type=int, default=3, help="loads from the cache (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("loading", collect(builtin_directory()))
    for each in [f"built-in={BUILTIN_PATH}", *options.model]:
        name, _, path = each.partition("=")
        measure(result, name, path, options.repetitions)
        if options.save:  # after each model: a large one takes many minutes
            print(result.save(), flush=True)
    print(result.report())


if __name__ == "__main__":
    main()
