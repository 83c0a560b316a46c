"""The aims for whole servers, each a bound and what a result file says of it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import stats
from benchmarks.results import Result, Series

__all__ = ["OURS", "Aim", "list_aims", "one"]

OURS = "ovserve stepwise"
OURS_GENAI = "ovserve genai"
PEERS = ("FastAPI", "LitServe", "mosec")


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim: a bound, and what was found; `found` None where it was not measured. `most`: the bound is from above."""

    name: str
    bound: float
    found: stats.Ratio | stats.Estimate | None
    most: bool = False
    unit: str = ""

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'≤' if self.most else '≥'} {self.bound:g} {self.unit}".rstrip()

    @property
    def verdict(self) -> str:
        """met or missed; with a remark when the interval holds the bound, so that another run may say otherwise."""
        if self.found is None:
            return ""
        is_met = self.found.value <= self.bound if self.most else self.found.value >= self.bound
        is_sure = not self.found.low < self.bound < self.found.high
        return ("met" if is_met else "**missed**") + ("" if is_sure else ", within noise")


def one(result: Result, name: str, **case: str | float) -> Series | None:
    """The series, or None when it was not measured."""
    found = result.select(name, **case)
    return found[0] if len(found) == 1 else None


def list_aims(result: Result) -> list[Aim]:
    """The aims that the benchmark of whole servers can judge."""
    return [*_throughput(result), *_waiting(result), *_added(result), *_starting(result), *_full_size(result)]


def _throughput(result: Result) -> list[Aim]:
    case: dict[str, str | float] = {"workload": "closed", "clients": 8}
    bare = one(result, "bare throughput", model="builtin")
    ours = one(result, "throughput", server=OURS, **case)
    genai = one(result, "throughput", server=OURS_GENAI, **case)
    peers = [series for peer in PEERS if (series := one(result, "throughput", server=peer, **case))]
    best = max(peers, key=lambda series: stats.percentile(series.values, 50), default=None)
    tails = [series for peer in PEERS if (series := one(result, "latency", server=peer, **case))]
    quickest = min(tails, key=lambda series: stats.percentile(series.values, 99), default=None)
    tail = _ratio(one(result, "latency", server=OURS, **case), quickest, 99)
    return [
        Aim("throughput, 8 clients, engine genai, over the bare pipeline", 0.97, _ratio(genai, bare)),
        Aim("throughput, 8 clients, engine stepwise, over the bare pipeline", 2.5, _ratio(ours, bare)),
        Aim("throughput, 8 clients, over the best of FastAPI, LitServe, mosec", 2.0, _ratio(ours, best)),
        Aim("p99 latency, 8 clients, over the best of them", 0.5, tail, most=True),
    ]


def _waiting(result: Result) -> list[Aim]:
    alone = one(result, "latency", server=OURS, workload="short alone")
    beside = one(result, "latency", server=OURS, workload="short beside long")
    health = one(result, "health check", server=OURS, workload="closed", clients=8)
    p99 = stats.estimate([1000 * value for value in health.values], 99) if health else None
    return [
        Aim("a 4-step job beside a 50-step job, over its time alone", 2.0, _ratio(beside, alone), most=True),
        Aim("health check, p99, 8 clients", 10.0, p99, most=True, unit="ms"),
    ]


def _added(result: Result) -> list[Aim]:
    found = []
    bare = one(result, "bare edit", model="builtin")
    for server, engine in ((OURS_GENAI, "genai"), (OURS, "stepwise")):
        single = one(result, "latency", server=server, workload="closed", clients=1)
        name = f"one client, one edit, engine {engine}, over the bare pipeline with decoding and encoding"
        found.append(Aim(name, 1.02, _ratio(single, bare), most=True))
        beside = one(result, "beside the work", engine=engine)
        name = f"added to one 512x512 edit, engine {engine}, to its decoding, denoising and encoding"
        added = stats.estimate([1000 * value for value in beside.values]) if beside else None
        found.append(Aim(name, 2.0, added, most=True, unit="ms"))
    return found


def _starting(result: Result) -> list[Aim]:
    cold, warm = (one(result, "start to ready", model="builtin", cache=cache) for cache in ("cold", "warm"))
    return [Aim("second start over the first (compiled-model cache)", 0.5, _ratio(warm, cold), most=True)]


def _full_size(result: Result) -> list[Aim]:
    case: dict[str, str | float] = {"model": "sd15", "side_px": 256, "steps": 4}
    bare = one(result, "bare edit", **case)
    found = []
    for server, engine in ((OURS_GENAI, "genai"), (OURS, "stepwise")):
        served = one(result, "latency", server=server, clients=1, quality="high", **case)
        name = f"full-size SD 1.5, engine {engine}: the bare pipeline's time over the server's"
        found.append(Aim(name, 0.98, _ratio(bare, served)))
    return found


def _ratio(above: Series | None, below: Series | None, rank: float = 50.0) -> stats.Ratio | None:
    return stats.ratio(above.values, below.values, rank) if above and below and above.values and below.values else None
