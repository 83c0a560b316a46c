"""Account for the CPU time of an edit: how much is in the model's own calls, and in what the rest is.

    python -m benchmarks.bench_account --rounds 3 --save

A server with the built-in model and engine stepwise (`accounted.py`) gets a closed loop of clients. The CPU time of
each part between two readings is divided by the edits that were answered between them. The rest of a process is what is
in no part: threads that wake up, locks, garbage collection, and the account itself. Processes without an account, such
as those that decode large images, are one part; it is also where the two clocks differ, by some hundredths.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks import metadata
from benchmarks.accounted import FOLDER_VARIABLE, MODEL_PARTS, WRITE_EVERY_S
from benchmarks.bench_serving import BUILTIN, SERVICES, USUAL_FIELDS, parse_kind
from benchmarks.load import Load, Target, apply_load
from benchmarks.results import Result
from benchmarks.servers import RunningServer
from ovserve.models.profile import builtin_directory

WARM_UP_S = 3.0
APART = 360  # between the numbers of the warm-up's requests and the measured ones: half of the prompts
REST = "rest of the process"
Account = dict[tuple[str, str], float]  # CPU seconds by process and part


def read_account(folder: Path, wait_s: float = 3 * WRITE_EVERY_S) -> Account:
    """Return the CPU seconds of all processes by part, after `wait_s`, in which they have written once more."""
    time.sleep(wait_s)
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for path in folder.glob("*.json"):
        document = json.loads(path.read_text("utf-8"))
        process, parts = document["process"], document["parts"]
        for part, seconds in parts.items():
            found[process, part] += seconds
        found[process, REST] += document["cpu_s"] - sum(parts.values())
    return dict(found)


def difference(before: Account, after: Account, edits: int) -> Account:
    """Return the CPU seconds of an edit by process and part."""
    return {key: (seconds - before.get(key, 0.0)) / edits for key, seconds in after.items()}


def outside_share(account: Account) -> float:
    """Return the share of the CPU time that is not in the model's own calls, 0..1."""
    total = sum(account.values())
    model = sum(seconds for (_, part), seconds in account.items() if part in MODEL_PARTS)
    return (total - model) / total


def measure(clients: int, seconds: float) -> Account:
    """Run one server, and return the account of an edit."""
    kinds = [parse_kind("edit", USUAL_FIELDS)]
    service = replace(SERVICES["ovserve stepwise"], module="benchmarks.accounted")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER_VARIABLE] = folder  # for the processes of the server
        try:
            with RunningServer(service, BUILTIN) as server:
                apply_load(Target(server.url), Load(clients=clients, seconds=WARM_UP_S, warm_up_s=0, kinds=kinds))
                before, before_s = read_account(Path(folder)), server.cpu_s()
                load = Load(clients=clients, seconds=seconds, warm_up_s=0, kinds=kinds, first=APART)
                edits = apply_load(Target(server.url), load).answered_in_all
                account = difference(before, read_account(Path(folder)), edits)
                others_s = (server.cpu_s() - before_s) / edits - sum(account.values())
                return {**account, ("other processes", REST): max(0.0, others_s)}
        finally:
            del os.environ[FOLDER_VARIABLE]


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8", help="numbers of clients (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each closed loop (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="servers for each number of clients (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("account", metadata.collect(builtin_directory()))
    for _ in range(options.rounds):
        for clients in map(int, options.clients.split(",")):
            account = measure(clients, options.seconds)
            for (process, part), seconds in sorted(account.items(), key=lambda item: -item[1]):
                result.add("cpu for an edit", [seconds], case={"clients": clients, "process": process, "part": part})
            result.add("cpu for an edit, all", [sum(account.values())], case={"clients": clients})
            result.add("outside the model's calls", [outside_share(account)], unit="", case={"clients": clients})
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
