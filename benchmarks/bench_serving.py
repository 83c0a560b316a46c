"""Measure whole servers, ours and the peers, on the same model: latency, throughput, memory and start-up.

    python -m benchmarks.bench_serving --set quick          some minutes, built-in model
    python -m benchmarks.bench_serving --set full           half an hour, with the full-size model if it is installed

Each round starts every server again, in another order, applies every load to it and stops it. Sections can be chosen by
name (`--only closed --only open`). The result is written after each section, so that an interrupted run keeps what it
has measured.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import metadata
from benchmarks.aims import LONE_STEPS
from benchmarks.edits import BUILTIN_NAME, parse_kind
from benchmarks.load import Load, Report, Target, apply_load
from benchmarks.results import Case, Result
from benchmarks.run import RUN_TIMEOUT_S, run_once
from benchmarks.servers import SERVICES, RunningServer, bench_home, model_path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
BUILTIN, FULL_SIZE = "builtin", "sd15"  # the models' names in result files
OURS = "ovserve stepwise"
# The built-in model and its defaults, in every request, so that every server does the same work. Peers ignore `model`.
USUAL_FIELDS = {
    "model": BUILTIN_NAME,
    "num_inference_steps": "12",
    "guidance_scale": "3.0",
    "strength": "0.7",
    "size": "256x256",
}
CAPACITY_CLIENTS = 8
LOAD_PERCENT = (50, 80, 95, 120)
SEED = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and for how long.

    Attributes:
        rounds: fresh starts of each server.
        seconds: measured window of one load.
        clients: numbers of clients of the closed loops.
        servers: servers measured on the built-in model.
        few: servers in the sections that take longer.
        sections: sections in the order in which they run.
        full_size: servers measured on the full-size model, with one, two and four clients.
        single: servers measured on the full-size model with one client only.
        limit_s: time after which no further server is started; the result names what was skipped.
    """

    rounds: int
    seconds: float
    clients: tuple[int, ...]
    servers: tuple[str, ...]
    few: tuple[str, ...]
    sections: tuple[str, ...]
    full_size: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    limit_s: float = 600.0


PEERS = ("FastAPI", "LitServe", "mosec")
PLANS = {
    "smoke": Plan(
        rounds=1,
        seconds=1.0,
        clients=(1, 2),
        servers=(OURS, "FastAPI"),
        few=(OURS,),
        sections=("closed", "lone", "overhead", "open", "mixed", "abandoned", "curves", "starts"),
    ),
    "quick": Plan(
        rounds=2,
        seconds=3.0,
        clients=(1, 8),
        servers=(OURS, "ovserve genai", *PEERS),
        few=(OURS, "FastAPI"),
        sections=("closed", "lone", "overhead", "open", "mixed", "abandoned", "curves", "starts"),
        limit_s=540,
    ),
    "full": Plan(
        rounds=2,
        seconds=4.0,
        clients=(1, 2, 4, 8, 16),
        servers=(OURS, "ovserve genai", *PEERS, "mosec 2x1"),
        few=(OURS, *PEERS),
        sections=("closed", "lone", "overhead", "open", "mixed", "abandoned", "full_size", "curves", "starts"),
        full_size=(OURS, "ovserve genai", "FastAPI", "mosec"),
        single=("optimum", "diffusers", "sd.cpp"),
        limit_s=2100,
    ),
}


class TimeLimitReached(RuntimeError):
    """The plan's time limit has passed: no further server is started."""


@dataclass(slots=True)
class Bench:
    """One run: the plan, the result so far, and the path of the result file."""

    plan: Plan
    result: Result
    out: Path | None
    skipped: dict[str, str] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    began: float = field(default_factory=time.monotonic)

    def servers(self, names: Sequence[str], model: str = BUILTIN) -> list[str]:
        """Return those of `names` that can be started, in another order at each call; record the others as skipped."""
        available = []
        for name in names:
            if reason := SERVICES[name].missing(model):
                self.skipped[f"{name}, {model}"] = reason
            else:
                available.append(name)
        self.rng.shuffle(available)
        return available

    def start(self, name: str, model: str = BUILTIN, extra: Sequence[str] = ()) -> RunningServer:
        """Start a server, send one edit, and add both times to the result.

        Raises:
            TimeLimitReached: the plan's time limit has passed.
            RuntimeError: the server did not become ready, or did not answer the edit.
        """
        if time.monotonic() - self.began > self.plan.limit_s:
            raise TimeLimitReached(
                f"the limit of {self.plan.limit_s:g} s has passed: {name}, {model} and everything after it is skipped"
            )
        server = RunningServer(SERVICES[name], model, extra)
        began = time.monotonic()
        report = edit_once(server, model)
        case: Case | None = None if extra else {"model": model, "server": name, "cache": "none"}
        if case is not None:
            self.result.add("start to ready", [server.ready_s], case=case)
            self.result.add("start to first answer", [server.ready_s + time.monotonic() - began], case=case)
        if not report.answered:
            server.stop()
            raise RuntimeError(f"{name} did not answer an edit: {report.outcomes()}")
        return server

    def add_report(self, report: Report, case: Case, *, with_throughput: bool = True) -> None:
        """Add the latencies, health checks, failures and, where it means capacity, the throughput of one load."""
        self.result.add("latency", report.latencies(), case=case)
        if with_throughput:
            self.result.add("throughput", [report.throughput], unit="1/s", better="higher", case=case)
        if report.probes:
            self.result.add("health check", report.probes, case=case)
        failed = len(report.samples) - len(report.answered)
        if failed or report.failed_probes:
            self.result.add("not answered", [failed], unit="requests", case=case)
            self.result.add("health checks failed", [report.failed_probes], unit="requests", case=case)
            print(f"  ! {case}: {report.outcomes()}, {report.failed_probes} health checks failed", flush=True)

    def save(self) -> Path:
        """Write the result so far, and return the path of the file."""
        self.result.metadata["skipped"] = self.skipped
        self.result.metadata["load_1min_at_the_end"] = metadata.load_average()
        return self.result.save(self.out)


def edit_once(server: RunningServer, model: str) -> Report:
    """Send one edit, and return its report."""
    fields = USUAL_FIELDS if model == BUILTIN else full_size_fields(256, 1)
    kind = parse_kind(f"edit:picture_px={fields['size'].partition('x')[0]}", fields)
    return apply_load(
        Target(server.url), Load(clients=1, seconds=300, warm_up_s=0, requests=1, timeout_s=300, kinds=[kind])
    )


def run_load(server: RunningServer, plan: Plan, *kinds: str, **chosen: float | str) -> Report:
    """Load a server with the given kinds of requests (default: edits), with health checks at the same time.

    Args:
        server: the server.
        plan: gives the length of the window.
        kinds: kinds as `parse_kind` reads them; USUAL_FIELDS are added.
        chosen: attributes of `Load` that differ from the usual ones.
    """
    values = {
        "seconds": plan.seconds,
        "warm_up_s": min(1.0, plan.seconds / 3),
        "probe": server.service.health,
        **chosen,
    }
    load = Load(kinds=[parse_kind(text, USUAL_FIELDS) for text in kinds or ("edit",)], **values)  # type: ignore[arg-type]
    return apply_load(Target(server.url), load)


def bare_loop(bench: Bench, model: str, fields: dict[str, str], seconds: float, min_edits: int, case: Case) -> None:
    """Measure the baseline: the bare pipeline in a loop in one process."""
    service = SERVICES["FastAPI"]
    if service.missing(model):
        return
    side = fields["size"].partition("x")[0]
    kind = f"edit:picture_px={side};" + ";".join(f"{key}={value}" for key, value in fields.items())
    bounds = ["--seconds", str(seconds), "--min_edits", str(min_edits)]
    done = subprocess.run(
        [
            str(service.python),
            "-m",
            "benchmarks.peers.bare_loop",
            "--model",
            str(model_path(model)),
            "--kind",
            kind,
            *bounds,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    times = json.loads(done.stdout.splitlines()[-1])
    bench.result.add("bare generate", times["generate_s"], case=case)
    bench.result.add("bare edit", times["whole_s"], case=case)
    bench.result.add("bare cpu", [times["cpu_s"]], case=case)
    bench.result.add(
        "bare throughput", [len(times["generate_s"]) / sum(times["generate_s"])], unit="1/s", better="higher", case=case
    )


# --- sections ---


def closed(bench: Bench) -> None:
    """Measure closed loops: k clients, each sends the next request when it has the answer."""
    plan = bench.plan
    for turn in range(plan.rounds):
        bare_loop(bench, BUILTIN, USUAL_FIELDS, plan.seconds, 3, {"model": BUILTIN})
        for name in bench.servers(plan.servers):
            print(f"  round {turn + 1}: {name}", flush=True)
            with bench.start(name) as server:
                for clients in plan.clients:
                    case: Case = {"model": BUILTIN, "server": name, "workload": "closed", "clients": clients}
                    before = server.cpu_s()
                    report = run_load(server, plan, clients=clients)
                    bench.add_report(report, case)
                    bench.result.add("cpu", [(server.cpu_s() - before) / max(1, report.answered_in_all)], case=case)
                    bench.result.add("memory", [server.memory()], unit="bytes", case=case)


def lone(bench: Bench) -> None:
    """Measure one client at several numbers of steps, and the bare pipeline in turns with each server."""
    plan = bench.plan
    for _ in range(plan.rounds):
        for steps in LONE_STEPS:
            fields = USUAL_FIELDS | {"num_inference_steps": str(steps)}
            bare_loop(bench, BUILTIN, fields, plan.seconds, 3, {"workload": "one client", "steps": steps})
        for name in bench.servers(plan.few[:2]):
            print(f"  {name}", flush=True)
            with bench.start(name) as server:
                for steps in LONE_STEPS:
                    report = run_load(server, plan, f"edit:num_inference_steps={steps}", clients=1, probe="")
                    case: Case = {"server": name, "workload": "one client", "steps": steps}
                    bench.add_report(report, case, with_throughput=False)


def overhead(bench: Bench) -> None:
    """Measure what the server adds to an edit of 512x512 pixels: the same work in one process and through the server.

    The difference of the two is not reliable: the same denoising takes 48 ms in one process and 67 ms in the next. So
    the latency of each answer minus the time of its own work (Server-Timing) is recorded too.
    """
    edits = max(5, round(10 * bench.plan.seconds))
    side = {"picture_px": 512, "size": "512x512"}
    kind = "edit:" + ";".join(f"{key}={value}" for key, value in side.items())
    for _ in range(bench.plan.rounds):
        for engine in ("genai", "stepwise"):
            command = [sys.executable, "-m", "benchmarks.in_process", "--engine", engine, "--edits", str(edits)]
            alone = run_once(command, RUN_TIMEOUT_S)
            case: Case = {"model": BUILTIN, "engine": engine, "side_px": 512}
            for figure, series in alone.items():
                bench.result.add(figure, series["values"], case=case)
            with RunningServer(SERVICES[f"ovserve {engine}"], BUILTIN) as server:
                run_load(server, bench.plan, kind, clients=1, requests=2, warm_up_s=0, probe="")
                report = run_load(
                    server, bench.plan, kind, clients=1, requests=edits, warm_up_s=0, seconds=120, probe=""
                )
            bench.result.add("through the server", report.latencies(), case=case)
            bench.result.add("beside the work", report.overheads(), case=case)


def open_loop(bench: Bench) -> None:
    """Measure open loops at parts of each server's own capacity, which is measured first, after the same start."""
    plan = bench.plan
    for name in bench.servers(plan.few):
        print(f"  {name}", flush=True)
        with bench.start(name) as server:
            capacity = run_load(server, plan, clients=CAPACITY_CLIENTS).throughput
            if not capacity:
                raise RuntimeError(f"{name} answered nothing within {plan.seconds:g} s")
            for percent in LOAD_PERCENT:
                rate = round(capacity * percent / 100, 2)
                case: Case = {"model": BUILTIN, "server": name, "workload": "open", "percent": percent}
                bench.add_report(run_load(server, plan, rate=rate, poisson=True), case, with_throughput=False)
                bench.result.add("arrival rate", [rate], unit="1/s", better="none", case=case)


def mixed(bench: Bench) -> None:
    """Measure a short job while a long one runs, and a mix of edits with and without masks."""
    plan = bench.plan
    short, long = "edit:num_inference_steps=4;strength=1.0", "edit:num_inference_steps=50;strength=1.0"
    for name in bench.servers(plan.few):
        print(f"  {name}", flush=True)
        with bench.start(name) as server:
            alone = run_load(server, plan, short, clients=1)
            bench.add_report(alone, {"model": BUILTIN, "server": name, "workload": "short alone"})
            long_load = Load(
                clients=1, seconds=2 * plan.seconds + 2, warm_up_s=0, kinds=[parse_kind(long, USUAL_FIELDS)]
            )
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(apply_load, Target(server.url), long_load)
                together = run_load(server, plan, short, clients=1, seconds=2 * plan.seconds)
                beside = running.result()
            bench.add_report(together, {"model": BUILTIN, "server": name, "workload": "short beside long"})
            bench.add_report(beside, {"model": BUILTIN, "server": name, "workload": "long beside short"})
            masks = run_load(server, plan, "edit", "masked", clients=CAPACITY_CLIENTS)
            bench.add_report(
                masks, {"model": BUILTIN, "server": name, "workload": "half with masks", "clients": CAPACITY_CLIENTS}
            )


def abandoned(bench: Bench) -> None:
    """Measure a one-step edit right after an abandoned edit of 100 steps, against a one-step edit alone."""
    plan = bench.plan
    quick, slow = "edit:num_inference_steps=1;strength=1.0", "edit:num_inference_steps=100;strength=1.0"
    for name in bench.servers(plan.few):
        with bench.start(name) as server:
            for _ in range(3 * plan.rounds):
                alone = run_load(server, plan, quick, clients=1, requests=1, warm_up_s=0, probe="")
                abandoning = Load(
                    clients=1,
                    requests=1,
                    warm_up_s=0,
                    abandon=1.0,
                    abandon_after_s=0.3,
                    kinds=[parse_kind(slow, USUAL_FIELDS)],
                )
                apply_load(Target(server.url), abandoning)
                after = run_load(server, plan, quick, clients=1, requests=1, warm_up_s=0, probe="", seconds=60)
                for workload, report in (("one step alone", alone), ("one step after a client has gone", after)):
                    bench.add_report(
                        report, {"model": BUILTIN, "server": name, "workload": workload}, with_throughput=False
                    )


def curves(bench: Bench) -> None:
    """Measure cost curves of single requests: n, steps, upload size, size of the result, and requests sent at once."""
    plan = bench.plan
    parameters: list[tuple[str, Sequence[int], str]] = [
        ("n", (1, 2, 4, 8), "edit:n={}"),
        ("steps", (1, 2, 4, 8, 16, 32, 64), "edit:num_inference_steps={};strength=1.0"),
        ("upload_bytes", (100_000, 1_000_000, 10_000_000), "edit:num_inference_steps=2;upload_bytes={}"),
        ("side_px", (128, 256, 512, 1024), "edit:num_inference_steps=2;picture_px={0};size={0}x{0}"),
    ]
    for name in bench.servers(plan.few[:2]):
        print(f"  {name}", flush=True)
        with bench.start(name) as server:
            for label, values, text in parameters:
                if label == "side_px" and not SERVICES[name].is_ours:
                    continue  # not the same work: a peer denoises at that size, ovserve at 256 px
                for value in values:
                    report = run_load(
                        server, plan, text.format(value), clients=1, seconds=plan.seconds / 2, requests=200
                    )
                    if not report.answered:  # one request takes longer than the window
                        report = run_load(
                            server, plan, text.format(value), clients=1, seconds=60, warm_up_s=0, requests=2
                        )
                    case: Case = {"model": BUILTIN, "server": name, "curve": label, label: value}
                    bench.add_report(report, case, with_throughput=False)
                    bench.result.add("memory", [server.memory()], unit="bytes", case=case)
            for length in (1, 4, 16, 64):
                report = run_load(server, plan, clients=length, requests=length, seconds=120, warm_up_s=0, probe="")
                case = {"model": BUILTIN, "server": name, "curve": "queue length", "queue length": length}
                bench.add_report(report, case, with_throughput=False)
                bench.result.add("memory", [server.memory()], unit="bytes", case=case)


def starts(bench: Bench) -> None:
    """Measure start-up with an empty and a filled model cache, and memory by replicas and resident models."""
    for _ in range(bench.plan.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                _timed_start(bench, BUILTIN, cache, ("--cache_dir", folder))
    for replicas in (1, 2):
        with bench.start(OURS, extra=("--replicas", str(replicas))) as server:
            run_load(server, bench.plan, clients=2 * replicas)
            case: Case = {"model": BUILTIN, "server": OURS, "curve": "replicas", "replicas": replicas}
            bench.result.add("memory", [server.memory()], unit="bytes", case=case)
    for models in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "models.toml"
            tables = [f'[[model]]\nname = "m{index}"\n' for index in range(models)]
            config.write_text('default_model = "m0"\n' + "".join(tables), "utf-8")
            service = SERVICES[OURS]
            with RunningServer(service, BUILTIN, ("--config", str(config)), plain=True) as server:
                for index in range(models):
                    await_model(server, f"m{index}")
                    run_load(server, bench.plan, f"edit:model=m{index}", clients=1, requests=3, warm_up_s=0, seconds=60)
                case = {"model": BUILTIN, "server": OURS, "curve": "resident models", "resident models": models}
                bench.result.add("memory", [server.memory()], unit="bytes", case=case)


def await_model(server: RunningServer, name: str) -> None:
    """Wait until one of several models is ready.

    Raises:
        RuntimeError: it is not ready after 60 s.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.answers(f"/v2/models/{name}/ready"):
            return
        time.sleep(0.05)
    raise RuntimeError(f"model {name} did not become ready")


def _timed_start(bench: Bench, model: str, cache: str, extra: Sequence[str]) -> None:
    began = time.monotonic()
    with RunningServer(SERVICES[OURS], model, extra) as server:
        edit_once(server, model)
        case: Case = {"model": model, "server": OURS, "cache": cache}
        bench.result.add("start to ready", [server.ready_s], case=case)
        bench.result.add("start to first answer", [time.monotonic() - began], case=case)


def full_size_fields(side_px: int, steps: int) -> dict[str, str]:
    """Return the form fields of an edit with the full-size model, at strength 1, so that every step runs."""
    return {
        "model": FULL_SIZE,
        "num_inference_steps": str(steps),
        "guidance_scale": "7.5",
        "strength": "1.0",
        "size": f"{side_px}x{side_px}",
    }


def full_size(bench: Bench) -> None:
    """Measure Stable Diffusion 1.5 with random weights: compute-bound, so the server should add almost nothing."""
    plan = bench.plan
    fields = full_size_fields(256, 4)
    for side, steps, min_edits in ((256, 4, 4), (512, 2, 2)):
        case: Case = {"model": FULL_SIZE, "side_px": side, "steps": steps}
        bare_loop(bench, FULL_SIZE, full_size_fields(side, steps), 1, min_edits, case)
    for name in (*bench.servers(plan.full_size, FULL_SIZE), *bench.servers(plan.single, FULL_SIZE)):
        print(f"  {name}", flush=True)
        try:
            with bench.start(name, FULL_SIZE) as server:
                for clients in (1, 2, 4) if name in plan.full_size else (1,):
                    _full_size_load(
                        bench, server, name, fields, clients, max(3, clients) if name in plan.full_size else 2
                    )
                if name == OURS:
                    for side in (256, 384, 512):
                        one_step = full_size_fields(side, 1)
                        _full_size_load(bench, server, name, one_step, 1, requests=2)
                if name in plan.full_size[:3]:
                    _full_size_load(bench, server, name, full_size_fields(512, 2), 1, requests=2)
        except TimeLimitReached:
            raise
        except (RuntimeError, OSError) as error:
            bench.skipped[f"{name}, {FULL_SIZE}"] = str(error)[:300]
            print(f"  ! {name}: {error}", flush=True)


def _full_size_load(
    bench: Bench, server: RunningServer, name: str, fields: dict[str, str], clients: int, requests: int
) -> None:
    side = int(fields["size"].partition("x")[0])
    kind = parse_kind(f"edit:picture_px={side}", fields)
    load = Load(
        clients=clients,
        requests=requests,
        seconds=600,
        warm_up_s=0,
        timeout_s=600,
        kinds=[kind],
        probe=server.service.health,
    )
    case: Case = {
        "model": FULL_SIZE,
        "server": name,
        "clients": clients,
        "side_px": side,
        "steps": int(fields["num_inference_steps"]),
        "quality": fields.get("quality", "high"),
    }
    bench.add_report(apply_load(Target(server.url), load), case)
    bench.result.add("memory", [server.memory()], unit="bytes", case=case)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "closed": closed,
    "overhead": overhead,
    "open": open_loop,
    "lone": lone,
    "mixed": mixed,
    "abandoned": abandoned,
    "curves": curves,
    "starts": starts,
    "full_size": full_size,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return 1 if a section failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=tuple(PLANS), default="quick", help="the set of measurements (%(default)s)")
    parser.add_argument("--only", action="append", choices=tuple(SECTIONS), help="run this section; may be repeated")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/DATE-SHA-serving.json")
    options = parser.parse_args(argv)
    bench_home().mkdir(parents=True, exist_ok=True)
    plan = PLANS[options.set]
    result = Result("serving", metadata.collect(model_path(BUILTIN)) | {"set": options.set})
    bench = Bench(plan, result, options.out)
    failed = 0
    path = None
    for name in options.only or plan.sections:
        began = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            SECTIONS[name](bench)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            failed += 1
            bench.skipped[f"section {name}"] = str(error)[:300]
            print(f"! {name}: {error}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        path = bench.save()
    print(result.report())
    print(path)
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
