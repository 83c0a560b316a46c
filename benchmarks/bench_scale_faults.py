"""Check and measure what clients receive while actors, a node and the whole cluster are lost.

    python benchmarks/bench_scale_faults.py --save

8 clients edit with the built-in model on a Ray cluster of this machine with two workers, each on a node of its own:

no faults                   the baseline
actors killed               SIGKILL to a random actor every 5 s
node killed, another added  every process of one node is killed; then another node is added
cluster created anew        every process of the cluster is ended; when clients get 503, another cluster starts at the
                            same address

Every request must be answered: with 200 and exactly the picture that a server with the local pool makes from the same
seed; with 503 and Retry-After; or with 500 `worker_crashed` if and only if the log shows two worker deaths for it. The
exit code is not 0 if one of these checks fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.clusterchaos import ClusterRun, run_cluster_chaos
from tests.proxies import free_port

IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
EVERY_S = 5.0


def add_counts(result: Result, run: ClusterRun) -> None:
    """Add what was counted and measured."""
    for name, phase in run.phases.items():
        counts = {
            "faults": phase.faults,
            "answered 200": phase.statuses[200],
            "answered 503": phase.statuses[503],
            "answered 500 worker_crashed": len(phase.crashed),
            "false or unknown answers": len(phase.false),
        }
        for label, count in counts.items():
            result.add("count", [count], unit="", better="none", case={"run": name, "of": label})
        rate = phase.statuses[200] / phase.seconds
        result.add("rate", [rate], unit="1/s", better="higher", case={"run": name})
        if phase.recoveries_s:
            result.add("recovery", phase.recoveries_s, case={"run": name})
    totals = {
        "requests without an answer": len(run.unanswered),
        "jobs given once more": len(run.retried),
        "jobs with two deaths": len(run.lost),
    }
    for label, count in totals.items():
        result.add("count", [count], unit="", better="none", case={"run": "all", "of": label})


def main() -> None:
    """Run the checks, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="number of actors that are killed (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("scale-faults", collect(builtin_directory()))
    with tempfile.TemporaryDirectory() as folder:
        run = run_cluster_chaos(Path(folder), IMAGE, free_port(), kills=options.kills, every_s=EVERY_S)
    add_counts(result, run)
    print(result.report())
    run.check()
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
