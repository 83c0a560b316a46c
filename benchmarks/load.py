"""A load on a running images server: an open loop at a fixed arrival rate, or a closed loop with k clients.

    python benchmarks/load.py http://127.0.0.1:8000 --clients 8 --seconds 10
    python benchmarks/load.py http://127.0.0.1:8000 --rate 12 --seconds 20 --kind edit*4 --kind masked:num_inference_steps=4

In an open loop requests are due at fixed times, whatever the server does, and latency counts from the time a request was due:
a server that stalls pays for every request that its stall held up. In a closed loop each client sends when it has its answer;
that shows capacity, and flatters the tail. Everything is bounded: time, requests, requests in flight, wait for an answer.
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

if __package__ in (None, ""):  # run as a file: the package is found beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import stats
from benchmarks.edits import Kind, parse_kind
from benchmarks.probe import Probe, Prober

__all__ = ["Load", "Report", "Sample", "Target", "apply_load"]

MOST_SECONDS = 3600.0
MOST_REQUESTS = 1_000_000
MOST_IN_FLIGHT = 512
LATE_S = (
    0.05  # a request sent this much after it was due was held up by the generator's own bound, not only by the server
)
ABANDONED = "abandoned"
WORK_STAGES = ("prepare", "denoise", "finish")  # of Server-Timing: what any program that does the edit has to do


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes.

    Attributes:
        url: scheme, host and port; a path in it replaces `prefix`.
        prefix: what stands before `/images/edits`.
        key: an API key, sent as a bearer token; empty: none.
        fields: form fields of every request, such as a model's name.
    """

    url: str
    prefix: str = "/v3"
    key: str = ""

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is opened by its first request."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)

    def path(self, task: str) -> str:
        """The request target of a task."""
        prefix = urllib.parse.urlsplit(self.url).path.rstrip("/") or self.prefix
        return f"{prefix}/images/{task}"


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. Either `rate` (open loop) or `clients` (closed loop).

    Attributes:
        rate: arrivals a second; 0: a closed loop.
        poisson: arrivals at random with that mean rate, and not evenly spaced.
        clients: of the closed loop.
        seconds: length of the measured window.
        warm_up_s: the load runs this long before the window begins; what falls into it is dropped.
        requests: most requests after the warm-up.
        in_flight: most requests at once in an open loop.
        timeout_s: longest wait for one answer.
        abandon: part of the requests (0..1) whose client goes away after `abandon_after_s`.
        probe: path of a health check that is fetched all the while; empty: none.
        probe_every_s: how often.
        kinds: what is mixed; None of them: plain edits.
    """

    rate: float = 0.0
    poisson: bool = False
    clients: int = 1
    seconds: float = 10.0
    warm_up_s: float = 1.0
    requests: int = MOST_REQUESTS
    in_flight: int = 128
    timeout_s: float = 120.0
    abandon: float = 0.0
    abandon_after_s: float = 0.05
    probe: str = ""
    probe_every_s: float = 0.05
    kinds: Sequence[Kind] = (Kind("edit"),)
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError when a bound is left."""
        if not 0 < self.seconds <= MOST_SECONDS or not 0 <= self.warm_up_s <= MOST_SECONDS:
            raise ValueError(f"seconds: more than 0, at most {MOST_SECONDS:g}")
        if not 1 <= self.requests <= MOST_REQUESTS:
            raise ValueError(f"requests: 1 to {MOST_REQUESTS}")
        if not 1 <= max(self.clients, 1) <= MOST_IN_FLIGHT or not 1 <= self.in_flight <= MOST_IN_FLIGHT:
            raise ValueError(f"clients, in_flight: 1 to {MOST_IN_FLIGHT}")
        if not self.kinds or self.rate < 0 or not 0 <= self.abandon <= 1 or self.timeout_s <= 0:
            raise ValueError("kinds, rate, abandon, timeout_s: out of range")
        if self.poisson and not self.rate:
            raise ValueError("poisson: needs a rate")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds from the start of the load; `status` 0 when there was no answer, with the reason in `error`.

    `work_s` is how long the server says it worked at it (header Server-Timing); 0 where it does not say.
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
        """From when it was due to the last byte of the answer."""
        return self.done_s - self.due_s


@dataclass(slots=True)
class Report:
    """What came of a load. Times in seconds; samples within the window only, but `answered_in_all` with the warm-up."""

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    failed_probes: int = 0
    late: int = 0
    answered_in_all: int = 0

    @property
    def answered(self) -> list[Sample]:
        """Those with a picture."""
        return [sample for sample in self.samples if sample.status == 200]

    def latencies(self, kind: str = "") -> list[float]:
        """Of the answered ones, of one kind or of all."""
        return [sample.latency_s for sample in self.answered if not kind or sample.kind == kind]

    def added(self) -> list[float]:
        """Latency less the server's own account of its work, of the answered ones that came with one.

        Of requests for one picture, one at a time: pictures that are made side by side are counted one after the other, and where
        pictures wait for one another inside an engine, that counts as work.
        """
        return [sample.latency_s - sample.work_s for sample in self.answered if sample.work_s]

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.answered) / self.seconds

    def outcomes(self) -> dict[str, int]:
        """How many of each status, or of each error without one."""
        return dict(Counter(str(sample.status or sample.error) for sample in self.samples).most_common())

    def as_json(self) -> dict[str, Any]:
        """Everything a caller in another process needs."""
        return {
            "seconds": self.seconds,
            "throughput": self.throughput,
            "outcomes": self.outcomes(),
            "late": self.late,
            "probes": [round(value, 6) for value in self.probes],
            "failed_probes": self.failed_probes,
            "samples": [[s.kind, *(round(t, 6) for t in (s.due_s, s.sent_s, s.done_s)), s.status, s.bytes, s.error] for s in self.samples],
        }  # fmt: skip

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{self.throughput:.2f} answers a second over {self.seconds:g} s; outcomes {self.outcomes()}"]
        groups = sorted({sample.kind for sample in self.answered})
        for kind in groups if len(groups) > 1 else [""]:
            lines += _quantiles(f"latency {kind}".strip(), self.latencies(kind))
        lines += _quantiles("health probe", self.probes)
        if self.failed_probes:
            lines.append(f"! {self.failed_probes} health probes failed")
        if self.late:
            lines.append(f"! {self.late} requests were sent late: more in flight than the bound of the generator")
        lines += [f"! latency {warning}" for warning in stats.warnings_of(self.latencies())]
        return "\n".join(lines)


def _quantiles(title: str, values: list[float]) -> list[str]:
    if not values:
        return []
    told = "  ".join(f"p{rank:g} {stats.estimate([1000 * value for value in values], rank)}" for rank in (50, 90, 99))
    return [f"{title}, ms: {told}  max {1000 * max(values):.4g}  n={len(values)}"]


def apply_load(target: Target, load: Load) -> Report:
    """Run a load to its end. Blocks for at most warm-up, window, and one timeout."""
    return _Run(target, load).run()


@dataclass(frozen=True, slots=True)
class _Answer:
    """Status, bytes and Server-Timing of an answer; the status is 0 without one."""

    status: int = 0
    size: int = 0
    timing: str = ""


class _Run:
    """One load under way: threads that take numbers, and what they saw."""

    def __init__(self, target: Target, load: Load) -> None:
        self._target, self._load = target, load
        self._lock = threading.Lock()
        self._taken = 0
        self._counted = 0  # of those, due after the warm-up
        self._samples: list[Sample] = []
        self._probes: list[Probe] = []
        self._chance = random.Random(load.seed)
        self._next_due = 0.0
        self._choices = [kind for kind in load.kinds for _ in range(kind.weight)]
        for kind in load.kinds:  # pictures are drawn before the clock starts
            for index in range(min(64, load.requests)):
                kind.body(index)
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
            self._probes = [one for one in prober.probes if begin <= one.due < end]
        return self._report()

    def _report(self) -> Report:
        load = self._load
        begin, end = load.warm_up_s, load.warm_up_s + load.seconds
        with self._lock:
            samples = sorted(self._samples, key=lambda sample: sample.due_s)
        if load.rate:  # all that was due in the window, whenever it was answered
            inside = [sample for sample in samples if begin <= sample.due_s < end]
            last = max((sample.done_s for sample in inside), default=end)
            seconds = max(load.seconds, last - begin)
        else:  # all that was answered in the window
            inside = [sample for sample in samples if begin <= sample.done_s < end]
            seconds = load.seconds
            if self._counted >= load.requests:
                seconds = max((sample.done_s for sample in inside), default=end) - begin
        return Report(
            seconds=seconds,
            samples=inside,
            probes=[one.latency_s for one in self._probes if one.is_healthy],
            failed_probes=sum(not one.is_healthy for one in self._probes),
            answered_in_all=sum(sample.status == 200 for sample in samples),
            late=sum(sample.sent_s - sample.due_s > LATE_S for sample in inside) if load.rate else 0,
        )

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _take(self) -> tuple[int, float, Kind, bool] | None:
        """The next request: number, when it is due, kind, whether its client goes away; None when the load is over."""
        load = self._load
        with self._lock:
            due = self._next_due if load.rate else self._now()
            spent = self._counted >= load.requests or self._taken >= MOST_REQUESTS
            if spent or due >= load.warm_up_s + load.seconds:
                return None
            index = self._taken
            self._taken += 1
            self._counted += due >= load.warm_up_s
            if load.poisson:
                self._next_due += self._chance.expovariate(load.rate)
            elif load.rate:
                self._next_due = self._taken / load.rate
            return index, due, self._chance.choice(self._choices), self._chance.random() < load.abandon

    def _client(self) -> None:
        connection = self._target.connect(self._load.timeout_s)
        while taken := self._take():
            index, due, kind, leaves = taken
            body = kind.body(index)
            if (wait := due - self._now()) > 0:
                time.sleep(wait)
            sent = self._now()
            try:
                answer = self._exchange(connection, kind, body.task, body.media_type, body.content, leaves)
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
        leaves: bool,
    ) -> _Answer:
        """What came back; nothing when the client went away."""
        headers = {"Content-Type": media_type}
        if self._target.key:
            headers["Authorization"] = f"Bearer {self._target.key}"
        fresh = connection.sock is None
        try:
            connection.request("POST", self._target.path(task), content, headers)
            if leaves and self._leave(connection):
                return _Answer()
            with connection.getresponse() as answer:
                return _Answer(answer.status, len(answer.read()), answer.getheader("server-timing", ""))
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection.close()
            if fresh:
                raise
        return self._exchange(connection, kind, task, media_type, content, leaves)  # an idle connection had been closed

    def _leave(self, connection: http.client.HTTPConnection) -> bool:
        """Close the connection unless the answer comes first."""
        readable, _, _ = select.select([connection.sock], [], [], self._load.abandon_after_s)
        if readable:
            return False
        connection.close()
        return True


def _work_s(timing: str) -> float:
    """The sum of WORK_STAGES in a Server-Timing header (W3C): `name;dur=milliseconds, ...`; 0 for one that reads otherwise."""
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
    """The command line; 1 when nothing was answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as http://127.0.0.1:8000; with a path, that replaces --prefix")
    parser.add_argument("--prefix", default="/v3", help="what stands before /images/edits (%(default)s)")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=VALUE", help="form field of every request"
    )
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="TASK[*WEIGHT][:key=value;...]",
        help="repeat for a mix; tasks: edit masked generate variation; keys: picture_px, upload_bytes, same, any form field",
    )
    for item in dataclasses.fields(Load):
        if item.name != "kinds":
            name, kind = f"--{item.name}", type(item.default)
            form: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
            parser.add_argument(name, default=item.default, **form, help=f"(default: {item.default})" if kind is not bool else None)  # fmt: skip
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
