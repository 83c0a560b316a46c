"""Aims for whole servers: the bound of each, and the value from a result file."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import stats
from benchmarks.results import Result, Series

__all__ = ["LONE_STEPS", "OURS", "Aim", "find_only", "list_aims"]

OURS = "ovserve stepwise"
OURS_GENAI = "ovserve genai"
PEERS = ("FastAPI", "LitServe", "mosec")
LONE_STEPS = (4, 12, 16, 32)  # steps of the request, of which strength 0.7 runs 2, 8, 11 and 22


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim and its measured value.

    Attributes:
        name: what is compared.
        bound: the limit.
        measured: the value; None where it was not measured.
        is_maximum: the value must not exceed the bound; otherwise it must not fall below it.
        unit: of the bound.
    """

    name: str
    bound: float
    measured: stats.Ratio | stats.Estimate | None
    is_maximum: bool = False
    unit: str = ""

    @property
    def bound_text(self) -> str:
        """The bound with its relation and unit."""
        return f"{'≤' if self.is_maximum else '≥'} {self.bound:g} {self.unit}".rstrip()

    @property
    def verdict(self) -> str:
        """Met or missed, and "within noise" if the interval contains the bound, so that another run may differ."""
        if self.measured is None:
            return ""
        is_met = self.measured.value <= self.bound if self.is_maximum else self.measured.value >= self.bound
        is_sure = not self.measured.low < self.bound < self.measured.high
        return ("met" if is_met else "**missed**") + ("" if is_sure else ", within noise")


def find_only(result: Result, name: str, **case: str | float) -> Series | None:
    """Return the only series with this name and case; None if there is none, or more than one."""
    found = result.select(name, **case)
    return found[0] if len(found) == 1 else None


def list_aims(result: Result) -> list[Aim]:
    """Return the aims that the benchmark of whole servers covers."""
    return [*_throughput(result), *_interference(result), *_overhead(result), *_start_up(result), *_full_size(result)]


def _throughput(result: Result) -> list[Aim]:
    case: dict[str, str | float] = {"workload": "closed", "clients": 8}
    bare = find_only(result, "bare throughput", model="builtin")
    ours = find_only(result, "throughput", server=OURS, **case)
    genai = find_only(result, "throughput", server=OURS_GENAI, **case)
    peers = [series for peer in PEERS if (series := find_only(result, "throughput", server=peer, **case))]
    best = max(peers, key=lambda series: stats.percentile(series.values, 50), default=None)
    tails = [series for peer in PEERS if (series := find_only(result, "latency", server=peer, **case))]
    fastest = min(tails, key=lambda series: stats.percentile(series.values, 99), default=None)
    tail = _ratio(find_only(result, "latency", server=OURS, **case), fastest, 99)
    return [
        Aim("throughput, 8 clients, engine genai, over the bare pipeline", 0.97, _ratio(genai, bare)),
        Aim("throughput, 8 clients, engine stepwise, over the bare pipeline", 2.5, _ratio(ours, bare)),
        Aim("throughput, 8 clients, over the best of FastAPI, LitServe, mosec", 2.5, _ratio(ours, best)),
        Aim("p99 latency, 8 clients, over the best of them", 0.4, tail, is_maximum=True),
    ]


def _interference(result: Result) -> list[Aim]:
    alone = find_only(result, "latency", server=OURS, workload="short alone")
    beside = find_only(result, "latency", server=OURS, workload="short beside long")
    health = find_only(result, "health check", server=OURS, workload="closed", clients=8)
    p99 = stats.estimate([1000 * value for value in health.values], 99) if health else None
    return [
        Aim(
            "latency of a 4-step job while a 50-step job runs, over its latency alone",
            2.0,
            _ratio(beside, alone),
            is_maximum=True,
        ),
        Aim("health check, p99, 8 clients", 10.0, p99, is_maximum=True, unit="ms"),
    ]


def _overhead(result: Result) -> list[Aim]:
    aims = [_lone(result, steps) for steps in LONE_STEPS]
    bare = find_only(result, "bare edit", model="builtin")
    for server, engine in ((OURS_GENAI, "genai"), (OURS, "stepwise")):
        single = find_only(result, "latency", server=server, workload="closed", clients=1)
        name = f"one client, one edit, engine {engine}, over the bare pipeline with decoding and encoding"
        aims.append(Aim(name, 1.0, _ratio(single, bare), is_maximum=True))
        overhead = find_only(result, "beside the work", engine=engine)
        name = f"latency of one 512x512 edit, engine {engine}, beyond its decoding, denoising and encoding"
        added = stats.estimate([1000 * value for value in overhead.values]) if overhead else None
        aims.append(Aim(name, 1.5, added, is_maximum=True, unit="ms"))
    return aims


def _lone(result: Result, steps: int) -> Aim:
    bare = find_only(result, "bare edit", workload="one client", steps=steps)
    served = find_only(result, "latency", server=OURS, workload="one client", steps=steps)
    name = f"one client, {steps} steps, engine stepwise, over the bare pipeline with decoding and encoding"
    return Aim(name, 1.0, _ratio(served, bare), is_maximum=True)


def _start_up(result: Result) -> list[Aim]:
    cold, warm = (find_only(result, "start to ready", model="builtin", cache=cache) for cache in ("cold", "warm"))
    return [Aim("second start over the first (compiled-model cache)", 0.5, _ratio(warm, cold), is_maximum=True)]


def _full_size(result: Result) -> list[Aim]:
    case: dict[str, str | float] = {"model": "sd15", "side_px": 256, "steps": 4}
    bare = find_only(result, "bare edit", **case)
    aims = []
    for server, engine in ((OURS_GENAI, "genai"), (OURS, "stepwise")):
        served = find_only(result, "latency", server=server, clients=1, quality="high", **case)
        name = f"full-size SD 1.5, engine {engine}: the bare pipeline's time over the server's"
        aims.append(Aim(name, 0.98, _ratio(bare, served)))
    return aims


def _ratio(numerator: Series | None, denominator: Series | None, rank: float = 50.0) -> stats.Ratio | None:
    if not (numerator and denominator and numerator.values and denominator.values):
        return None
    return stats.ratio(numerator.values, denominator.values, rank)
