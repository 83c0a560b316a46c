"""Draw flame graphs of the whole server under load, of one client and of eight, with py-spy.

    uv pip install py-spy
    python -m benchmarks.flames              # writes docs/flames/flame-1.svg and docs/flames/flame-8.svg

Samples are taken in all processes and threads. A thread that waits is left out where py-spy sees that; it does not see
it for some waits of Python's queues and locks, which then have a frame of their own (`wait`, `get`, `_serve`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_serving import BUILTIN, SERVICES, USUAL_FIELDS, parse_kind
from benchmarks.load import Load, Target, apply_load
from benchmarks.servers import RunningServer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "flames"
CLIENTS = (1, 8)
WARM_UP_S = 3.0
RATE_HZ = 200  # samples a second


def draw(clients: int, seconds: float, path: Path) -> None:
    """Record the server with a closed loop of clients, and write the flame graph."""
    load = Load(clients=clients, seconds=seconds + 2 * WARM_UP_S, warm_up_s=0, kinds=[parse_kind("edit", USUAL_FIELDS)])
    with RunningServer(SERVICES["ovserve stepwise"], BUILTIN) as server:
        loading = threading.Thread(target=lambda: apply_load(Target(server.url), load))
        loading.start()
        time.sleep(WARM_UP_S)
        options = ["--subprocesses", "--format", "flamegraph", "--rate", str(RATE_HZ), "--duration", str(int(seconds))]
        command = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(server.pid), *options]
        subprocess.run([*command, "--output", str(path)], check=True)
        loading.join()
    path.write_text(path.read_text("utf-8").replace(f"{ROOT}/", ""), "utf-8")  # command lines of the processes


def main() -> None:
    """Draw the graphs of both numbers of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of recording (%(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(docs/flames)")
    options = parser.parse_args()
    for clients in CLIENTS:
        draw(clients, options.seconds, options.folder / f"flame-{clients}.svg")


if __name__ == "__main__":
    main()
