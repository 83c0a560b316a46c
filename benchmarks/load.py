"""Load a running images server: an open loop at a fixed arrival rate, or a closed loop with k clients.

    python benchmarks/load.py http://127.0.0.1:8000 --clients 8 --seconds 10
    python benchmarks/load.py http://127.0.0.1:8000 --rate 12 --kind edit*4 --kind masked:num_inference_steps=4

In an open loop, requests are due at fixed times that do not depend on the server, and latency counts from the due time,
so a stall raises the latency of every request that is due during it. In a closed loop, each client sends the next
request when it has the answer; that measures capacity, but underestimates the tail. Everything is bounded: time,
requests, requests in flight, and the wait for an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import random
import select
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import stats
from benchmarks.edits import Kind, parse_kind
from benchmarks.probe import Probe, Prober

__all__ = ["Load", "Report", "Sample", "Target", "apply_load"]

MAX_SECONDS = 3600.0
MAX_REQUESTS = 1_000_000
MAX_IN_FLIGHT = 512
LATE_S = 0.05  # sent this long after it was due: the generator's limit of requests in flight delayed it too
ABANDONED = "abandoned"
WORK_STAGES = ("prepare", "denoise", "finish")  # entries of Server-Timing that every program that makes the edit needs


@dataclass(frozen=True, slots=True)
class Target:
    """The server that receives the load.

    Attributes:
        url: scheme, host and port; a path in it replaces `prefix`.
        prefix: path before `/images/edits`.
        key: an API key, sent as a bearer token; empty: none.
    """

    url: str
    prefix: str = "/v3"
    key: str = ""

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """Return a connection; its first request opens it."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)

    def path(self, task: str) -> str:
        """Return the request target of a task."""
        prefix = urllib.parse.urlsplit(self.url).path.rstrip("/") or self.prefix
        return f"{prefix}/images/{task}"


@dataclass(frozen=True, slots=True)
class Load:
    """A load: an open loop if `rate` is set, else a closed loop with `clients`.

    Attributes:
        rate: arrivals per second; 0: a closed loop.
        poisson: random arrivals with that mean rate, instead of evenly spaced ones.
        clients: number of clients of the closed loop.
        seconds: length of the measured window.
        warm_up_s: time for which the load runs before the window begins; samples in it are dropped.
        requests: largest number of requests after the warm-up.
        first: number of the first request; a server may have the results of equal numbers in a cache.
        in_flight: largest number of requests at once in an open loop.
        timeout_s: longest wait for one answer.
        abandon: part of the requests (0..1) whose connection is closed after `abandon_after_s`, before the answer.
        abandon_after_s: time after which such a request is abandoned.
        probe: path of a health check that is fetched during the whole load; empty: none.
        probe_every_s: interval of the health check.
        kinds: kinds of requests to mix; at least one.
        seed: of the mix, of random arrivals, and of which requests are abandoned.
    """

    rate: float = 0.0
    poisson: bool = False
    clients: int = 1
    seconds: float = 10.0
    warm_up_s: float = 1.0
    requests: int = MAX_REQUESTS
    first: int = 0
    in_flight: int = 128
    timeout_s: float = 120.0
    abandon: float = 0.0
    abandon_after_s: float = 0.05
    probe: str = ""
    probe_every_s: float = 0.05
    kinds: Sequence[Kind] = (Kind("edit"),)
    seed: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is out of range.
        """
        if not 0 < self.seconds <= MAX_SECONDS or not 0 <= self.warm_up_s <= MAX_SECONDS:
            raise ValueError(
                f"seconds is {self.seconds:g}, warm_up_s is {self.warm_up_s:g}; seconds must be more than 0, warm_up_s"
                f" 0 or more, and both at most {MAX_SECONDS:g}"
            )
        if not 1 <= self.requests <= MAX_REQUESTS:
            raise ValueError(f"requests is {self.requests}; it must be 1 to {MAX_REQUESTS}")
        if not 1 <= max(self.clients, 1) <= MAX_IN_FLIGHT or not 1 <= self.in_flight <= MAX_IN_FLIGHT:
            raise ValueError(
                f"clients is {self.clients}, in_flight is {self.in_flight}; each must be 1 to {MAX_IN_FLIGHT}"
            )
        if not self.kinds or self.rate < 0 or not 0 <= self.abandon <= 1 or self.timeout_s <= 0:
            raise ValueError("at least one kind is required; rate must be 0 or more, abandon 0 to 1, timeout_s above 0")
        if self.poisson and not self.rate:
            raise ValueError("poisson requires a rate")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are seconds from the start of the load.

    Attributes:
        kind: name of its kind.
        due_s: when it was due.
        sent_s: when it was sent.
        done_s: when the answer was complete, or the request failed.
        status: of the answer; 0 without an answer.
        bytes: size of the answer's content.
        error: why there was no answer; empty if there was one.
        work_s: time that the server spent on the edit itself, from its Server-Timing field; 0 without that field.
    """

    kind: str
    due_s: float
    sent_s: float
    done_s: float
    status: int
    bytes: int
    error: str = ""
    work_s: float = 0.0

    @property
    def latency_s(self) -> float:
        """Seconds from the due time to the last byte of the answer."""
        return self.done_s - self.due_s


@dataclass(slots=True)
class Report:
    """The outcome of a load. Times are in seconds.

    Attributes:
        seconds: length of the window.
        samples: requests in the window.
        probes: latencies of the health checks in the window that were answered with 200.
        failed_probes: number of the others.
        late: number of requests that were sent late because of the generator's own limit.
        answered_in_all: number of requests answered with 200, those in the warm-up included.
    """

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    failed_probes: int = 0
    late: int = 0
    answered_in_all: int = 0

    @property
    def answered(self) -> list[Sample]:
        """Samples that were answered with 200."""
        return [sample for sample in self.samples if sample.status == 200]

    def latencies(self, kind: str = "") -> list[float]:
        """Return the latencies of the answered requests of one kind, or of all kinds."""
        return [sample.latency_s for sample in self.answered if not kind or sample.kind == kind]

    def overheads(self) -> list[float]:
        """Return latency minus `work_s` of each answered request with a Server-Timing field.

        Correct only for one picture per request and one request at a time: times of pictures that are made side by side
        are added up, and the time for which pictures wait for each other inside an engine counts as work.
        """
        return [sample.latency_s - sample.work_s for sample in self.answered if sample.work_s]

    @property
    def throughput(self) -> float:
        """Answers per second."""
        return len(self.answered) / self.seconds

    def outcomes(self) -> dict[str, int]:
        """Return the number of requests for each status, or for each error if there was no answer."""
        return dict(Counter(str(sample.status or sample.error) for sample in self.samples).most_common())

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object, with every sample."""
        return {
            "seconds": self.seconds,
            "throughput": self.throughput,
            "outcomes": self.outcomes(),
            "late": self.late,
            "probes": [round(value, 6) for value in self.probes],
            "failed_probes": self.failed_probes,
            "samples": [
                [s.kind, *(round(t, 6) for t in (s.due_s, s.sent_s, s.done_s)), s.status, s.bytes, s.error]
                for s in self.samples
            ],
        }  # fmt: skip

    def text(self) -> str:
        """Return the report for the terminal."""
        lines = [f"{self.throughput:.2f} answers per second over {self.seconds:g} s; outcomes {self.outcomes()}"]
        groups = sorted({sample.kind for sample in self.answered})
        for kind in groups if len(groups) > 1 else [""]:
            lines += _quantiles(f"latency {kind}".strip(), self.latencies(kind))
        lines += _quantiles("health probe", self.probes)
        if self.failed_probes:
            lines.append(f"! {self.failed_probes} health probes failed")
        if self.late:
            lines.append(f"! {self.late} requests were sent late: in_flight was reached; raise it, or lower the rate")
        lines += [f"! latency {warning}" for warning in stats.warnings_of(self.latencies())]
        return "\n".join(lines)


def _quantiles(title: str, values: list[float]) -> list[str]:
    if not values:
        return []
    text = "  ".join(f"p{rank:g} {stats.estimate([1000 * value for value in values], rank)}" for rank in (50, 90, 99))
    return [f"{title}, ms: {text}  max {1000 * max(values):.4g}  n={len(values)}"]


def apply_load(target: Target, load: Load) -> Report:
    """Run a load to its end. Blocks for at most the warm-up, the window and one timeout."""
    return _Run(target, load).run()


@dataclass(frozen=True, slots=True)
class _Answer:
    """Status, size of the content and Server-Timing field of an answer; the status is 0 without an answer."""

    status: int = 0
    size: int = 0
    timing: str = ""


class _Run:
    """A running load: client threads that take the next request, and their samples. The lock guards both."""

    def __init__(self, target: Target, load: Load) -> None:
        self._target, self._load = target, load
        self._lock = threading.Lock()
        self._taken = 0
        self._counted = 0  # those of them that are due after the warm-up
        self._samples: list[Sample] = []
        self._probes: list[Probe] = []
        self._rng = random.Random(load.seed)
        self._next_due = 0.0
        self._choices = [kind for kind in load.kinds for _ in range(kind.weight)]
        for kind in load.kinds:  # fill the caches of pictures before the clock starts
            for index in range(min(64, load.requests)):
                kind.body(load.first + index)
        self._started = 0.0

    def run(self) -> Report:
        load = self._load
        count = load.in_flight if load.rate else load.clients
        threads = [threading.Thread(target=self._client, daemon=True) for _ in range(count)]
        prober = Prober(self._target.url, load.probe, load.probe_every_s) if load.probe else None
        with prober or contextlib.nullcontext():
            self._started = time.monotonic()
            for thread in threads:
                thread.start()
            deadline = self._started + load.warm_up_s + load.seconds + load.timeout_s
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            end = min(time.monotonic(), self._started + load.warm_up_s + load.seconds)
        if prober:
            begin = self._started + load.warm_up_s
            self._probes = [probe for probe in prober.probes if begin <= probe.due < end]
        return self._report()

    def _report(self) -> Report:
        load = self._load
        begin, end = load.warm_up_s, load.warm_up_s + load.seconds
        with self._lock:
            samples = sorted(self._samples, key=lambda sample: sample.due_s)
        if load.rate:  # all requests due in the window, even if they were answered after it
            inside = [sample for sample in samples if begin <= sample.due_s < end]
            last = max((sample.done_s for sample in inside), default=end)
            seconds = max(load.seconds, last - begin)
        else:  # all requests answered in the window
            inside = [sample for sample in samples if begin <= sample.done_s < end]
            seconds = load.seconds
            if self._counted >= load.requests:
                seconds = max((sample.done_s for sample in inside), default=end) - begin
        return Report(
            seconds=seconds,
            samples=inside,
            probes=[probe.latency_s for probe in self._probes if probe.is_healthy],
            failed_probes=sum(not probe.is_healthy for probe in self._probes),
            answered_in_all=sum(sample.status == 200 for sample in samples),
            late=sum(sample.sent_s - sample.due_s > LATE_S for sample in inside) if load.rate else 0,
        )

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _take(self) -> tuple[int, float, Kind, bool] | None:
        """Return number, due time and kind of the next request, and whether to abandon it; None at the end."""
        load = self._load
        with self._lock:
            due = self._next_due if load.rate else self._now()
            spent = self._counted >= load.requests or self._taken >= MAX_REQUESTS
            if spent or due >= load.warm_up_s + load.seconds:
                return None
            index = self._taken
            self._taken += 1
            self._counted += due >= load.warm_up_s
            if load.poisson:
                self._next_due += self._rng.expovariate(load.rate)
            elif load.rate:
                self._next_due = self._taken / load.rate
            return index, due, self._rng.choice(self._choices), self._rng.random() < load.abandon

    def _client(self) -> None:
        connection = self._target.connect(self._load.timeout_s)
        while taken := self._take():
            index, due, kind, abandons = taken
            body = kind.body(self._load.first + index)
            if (wait := due - self._now()) > 0:
                time.sleep(wait)
            sent = self._now()
            try:
                answer = self._exchange(connection, kind, body.task, body.media_type, body.content, abandons)
                error = "" if answer.status else ABANDONED
            except (OSError, http.client.HTTPException) as problem:
                connection.close()
                answer, error = _Answer(), type(problem).__name__
            done = self._now()
            sample = Sample(kind.name, due, sent, done, answer.status, answer.size, error, _work_s(answer.timing))
            with self._lock:
                self._samples.append(sample)
        connection.close()

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        kind: Kind,
        task: str,
        media_type: str,
        content: bytes,
        abandons: bool,
    ) -> _Answer:
        """Send a request and return the answer; an empty one if the request was abandoned."""
        headers = {"Content-Type": media_type}
        if self._target.key:
            headers["Authorization"] = f"Bearer {self._target.key}"
        fresh = connection.sock is None
        try:
            connection.request("POST", self._target.path(task), content, headers)
            if abandons and self._abandon(connection):
                return _Answer()
            with connection.getresponse() as answer:
                return _Answer(answer.status, len(answer.read()), answer.getheader("server-timing", ""))
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection.close()
            if fresh:
                raise
        # The server had closed the idle connection: send the request again on a new one.
        return self._exchange(connection, kind, task, media_type, content, abandons)

    def _abandon(self, connection: http.client.HTTPConnection) -> bool:
        """Close the connection after `abandon_after_s`, unless the answer comes first. Return whether it was closed."""
        readable, _, _ = select.select([connection.sock], [], [], self._load.abandon_after_s)
        if readable:
            return False
        connection.close()
        return True


def _work_s(timing: str) -> float:
    """Return the seconds of WORK_STAGES in a Server-Timing field (W3C), `name;dur=milliseconds, ...`; 0 if absent."""
    total_ms = 0.0
    for entry in timing.split(","):
        name, *parameters = (item.strip() for item in entry.split(";"))
        for parameter in parameters:
            key, _, duration = parameter.partition("=")
            if name in WORK_STAGES and key == "dur":
                with contextlib.suppress(ValueError):
                    total_ms += float(duration)
    return total_ms / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return 1 if no request was answered, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as http://127.0.0.1:8000; a path in it replaces --prefix")
    parser.add_argument("--prefix", default="/v3", help="path before /images/edits (%(default)s)")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=VALUE", help="form field of every request"
    )
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="TASK[*WEIGHT][:key=value;...]",
        help="kind of request; repeat it for a mix. Tasks: edit, masked, generate, variation. "
        "Keys: picture_px, upload_bytes, same, or a form field",
    )
    for item in dataclasses.fields(Load):
        if item.name != "kinds":
            name, kind = f"--{item.name}", type(item.default)
            form: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
            text = None if kind is bool else f"(default: {item.default})"
            parser.add_argument(name, default=item.default, **form, help=text)
    parser.add_argument("--json", action="store_true", help="print every sample as one JSON object")
    options = parser.parse_args(argv)
    try:
        shared = dict(text.split("=", 1) for text in options.field)
        kinds = [parse_kind(text, shared) for text in options.kind or ["edit"]]
        chosen = {item.name: getattr(options, item.name) for item in dataclasses.fields(Load) if item.name != "kinds"}
        load = Load(kinds=kinds, **chosen)
    except ValueError as error:
        parser.error(str(error))
    report = apply_load(Target(options.url, options.prefix, options.key), load)
    print(json.dumps(report.as_json()) if options.json else report.text())
    return 0 if report.answered else 1


if __name__ == "__main__":
    sys.exit(main())
