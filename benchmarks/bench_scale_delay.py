"""What a slow network between the front end and a node costs.

    python benchmarks/bench_scale_delay.py --rounds 5 --save

The node is in a network namespace of this machine; each packet to it and from it waits for `delay_ms`. Needs root.

- `edit`: a small edit that a toy worker answers at once, one after another; the baseline is the local pool, in turns.
- `large`: the same with an upload and a picture of 2 MB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx

from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.farnode import HEAD_HOST, FarNode
from tests.faultserver import TINY_PNG, FaultServer
from tests.raycluster import RayCluster

DELAYS_S = (0.0, 0.002, 0.02)
EDITS = {"edit": 10, "large": 3}  # of one round
LARGE_BYTES = 2_000_000


def time_edits(client: httpx.Client, kind: str) -> list[float]:
    """Return the seconds of each of several edits."""
    image = TINY_PNG + bytes(LARGE_BYTES) if kind == "large" else TINY_PNG
    times = []
    for _ in range(EDITS[kind]):
        begun = time.perf_counter()
        reply = client.post("/v3/images/edits", data={"prompt": "echo x"}, files={"image": ("a.png", image)})
        assert reply.status_code == 200, reply.text
        times.append(time.perf_counter() - begun)
    return times


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("scale-delay", collect(builtin_directory()))
    with ExitStack() as stack:
        far = stack.enter_context(FarNode())
        cluster = stack.enter_context(RayCluster(cpus=0, host=HEAD_HOST))
        far.start(cluster)
        remote = ("--pool", "ray", "--ray_address", cluster.address, "--placement", "cpus=1,far=1")
        clients = {}
        for name, arguments in (("local", ()), ("far", remote)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = FaultServer(folder, "--log_level", "error", *arguments, environment=cluster.environment)
            clients[name] = stack.enter_context(stack.enter_context(server).client())
            for kind in EDITS:
                time_edits(clients[name], kind)  # the first ones are slower
        for _ in range(options.rounds):
            for kind in EDITS:
                result.add(kind, time_edits(clients["local"], kind), case={"pool": "local"})
                for far.delay_s in DELAYS_S:
                    case = {"pool": "node", "delay_ms": round(1000 * far.delay_s)}
                    result.add(kind, time_edits(clients["far"], kind), case=case)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
