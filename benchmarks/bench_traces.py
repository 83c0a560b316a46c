"""Measure what traces cost a request: servers without the option, with it and no sampled request, and with all sampled.

    python -m benchmarks.bench_traces
    python -m benchmarks.bench_traces --rounds 20 --save

The servers have toy workers, which answer at once, so that what traces add is a large part of the work. Two of the
servers have no traces: the difference between them is the noise of the measurement. Rounds alternate the order of the
servers. All of them, their clients and the receiver of the spans share the machine's cores.

request      a generation on a persistent connection: each of the clients sends the next one when it has the answer
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import stats
from benchmarks.bench_tls import together
from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer
from tests.otlp import receiving

REQUESTS = 100  # of each client in a round
TIMEOUT_S = 60.0
BODY = json.dumps({"prompt": "echo"})
HEADERS = {"Content-Type": "application/json", "traceparent": f"00-{'4b' * 16}-{'00f0' * 4}-01"}
OFF, OFF_AGAIN, UNSAMPLED, ON = "off", "off, second server", "on, none sampled", "on, all sampled"


def requests(server: FaultServer) -> list[float]:
    """Return the seconds of each request on one connection; the first is not counted."""
    found = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)) as client:
        for _ in range(REQUESTS + 1):
            started = time.perf_counter()
            client.request("POST", "/v1/images/generations", BODY, HEADERS)
            response = client.getresponse()
            response.read()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}")
            found.append(time.perf_counter() - started)
    return found[1:]


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("traces", collect(builtin_directory()))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        exporter = {"OTEL_EXPORTER_OTLP_ENDPOINT": stack.enter_context(receiving()).url}
        sampled = {**exporter, "OTEL_TRACES_SAMPLER": "always_on"}
        unsampled = {**exporter, "OTEL_TRACES_SAMPLER": "always_off"}
        servers: dict[str, FaultServer] = {}
        for name, variables in ((OFF, None), (OFF_AGAIN, None), (UNSAMPLED, unsampled), (ON, sampled)):
            spool = folder / str(len(servers))
            spool.mkdir()
            arguments = ["--log_level", "error", *(["--traces", "true"] if variables else [])]
            servers[name] = stack.enter_context(FaultServer(spool, *arguments, environment=variables))
        for number in range(options.rounds):
            order = list(servers)[number % 4 :] + list(servers)[: number % 4]
            for name in order if number % 8 < 4 else reversed(order):
                values, rate = together(lambda server=servers[name]: requests(server))
                result.add("request time", values, case={"traces": name})
                result.add("request rate", [rate], unit="1/s", better="higher", case={"traces": name})
    print(result.report())
    base = result.find("request time", traces=OFF).values
    for name in (OFF_AGAIN, UNSAMPLED, ON):
        values = result.find("request time", traces=name).values
        print(f"{name}: median over that of {OFF!r} {stats.ratio(values, base)}")
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
