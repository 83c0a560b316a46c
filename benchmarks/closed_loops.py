r"""Measure the server of one checkout with one client and with eight; prints a JSON object for benchmarks/run.py.

Two checkouts in turns, each with its own packages of this project:

    python -m benchmarks.run --name versions --runs 10 \
        before='env PYTHONPATH=OLD python benchmarks/closed_loops.py' \
        after='env PYTHONPATH=NEW python benchmarks/closed_loops.py'

Each run starts the server with the built-in model and engine stepwise; the compiled models are in the cache.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.bench_serving import BUILTIN, SERVICES, USUAL_FIELDS, parse_kind
from benchmarks.load import Load, Target, apply_load
from benchmarks.servers import RunningServer

CLIENTS = (1, 8)
WARM_UP_S = 2.0
APART = 360  # between the numbers of the warm-up's requests and the measured ones: half of the prompts


def main() -> None:
    """Start the server, load it with each number of clients, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each closed loop (%(default)s)")
    options = parser.parse_args()
    kinds = [parse_kind("edit", USUAL_FIELDS)]
    series = {}
    with RunningServer(SERVICES["ovserve stepwise"], BUILTIN) as server:
        series["start"] = {"values": [server.ready_s]}
        for clients in CLIENTS:
            target = Target(server.url)
            apply_load(target, Load(clients=clients, seconds=WARM_UP_S, warm_up_s=0, kinds=kinds))
            before = server.cpu_s()
            load = Load(clients=clients, seconds=options.seconds, warm_up_s=0, kinds=kinds, first=APART)
            report = apply_load(target, load)
            cpu_s = (server.cpu_s() - before) / max(1, report.answered_in_all)
            series[f"seconds for an edit, clients {clients}"] = {"values": [1 / report.throughput]}
            series[f"cpu for an edit, clients {clients}"] = {"values": [cpu_s]}
    print(json.dumps({"series": series}))


if __name__ == "__main__":
    main()
