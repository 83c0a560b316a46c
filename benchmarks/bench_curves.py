"""Measure how the processor time of a request grows with a quantity, and report curves that grow faster than linearly.

    python -m benchmarks.bench_curves
    python -m benchmarks.bench_curves --rounds 5 --save
    python -m benchmarks.compare OLD-curves.json NEW-curves.json --name growth --threshold 0.25

Each curve has a quantity with some values, and a unit of work. The cost is the processor time of all processes of the
server for one unit; other work on the machine changes it less than it changes times. `growth` is the cost of a unit at
the largest value over the lowest cost at a smaller value, measured in the same round. It does not depend on the speed
of the machine, so `compare` can check it against a file from another one.

clients         clients that send edits at the same time; unit: request
upload MiB      size of the uploaded file; unit: MiB
waiting         jobs that wait at another model; unit: request
models          resident models; unit: request
keys            API keys in each of the two key files; unit: request
kept pictures   pictures kept for `response_format=url`; unit: request
n               pictures of one request of the built-in model; unit: picture
steps           denoising steps of the built-in model; unit: step
side px         side of the picture of the built-in model, squared: pixels; unit: pixel

All but the last three run with toy workers, which compute nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_server import cpu_seconds
from benchmarks.edits import BUILTIN_PATH
from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory
from tests.faultserver import TINY_PNG, FaultServer
from tests.live import LiveServer, children_of

REQUESTS = 300
KEPT_REQUESTS = 200
UPLOADS = 6
CAPACITY = 4  # jobs that a toy worker runs at once
EDITS = 6
MIB = 1 << 20
KEY = "sk-measured"
TIMEOUT_S = 120.0
IDLE_S = 2.0  # for the processor time of an idle server
Cost = float  # seconds of processor time for one unit


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity with its values, in ascending order, and a function that measures the cost of a unit at each."""

    quantity: str
    values: tuple[int, ...]
    measure: Callable[[Path, tuple[int, ...]], Iterator[Cost]]


def cpu_of(server: LiveServer) -> float:
    """Return the processor time that all processes of a server have taken so far, in seconds."""
    return sum(cpu_seconds(pid) for pid in (server.process.pid, *children_of(server.process.pid)))


def cost_of(server: LiveServer, send: Callable[[], None], units: int) -> Cost:
    """Return what `send` costs the server beyond the processor time of an idle server, for each unit of its work."""
    idle_from = cpu_of(server)
    time.sleep(IDLE_S)
    before, began_at = cpu_of(server), time.monotonic()
    send()
    idle_s = (before - idle_from) / IDLE_S * (time.monotonic() - began_at)
    return (cpu_of(server) - before - idle_s) / units


def check(reply: httpx.Response) -> None:
    """Raise RuntimeError unless the reply is 200."""
    if reply.status_code != 200:
        raise RuntimeError(f"{reply.status_code}: {reply.text[:300]}")


def edit(client: httpx.Client, prompt: str, content: bytes = TINY_PNG, **fields: object) -> None:
    """Send an edit whose prompt is the toy worker's command."""
    data = {"prompt": prompt, **{name: str(value) for name, value in fields.items()}}
    check(client.post("/v1/images/edits", data=data, files={"image": ("a.png", content)}))


def toy_table(name: str, **options: object) -> str:
    """Return the table of a model with toy workers for a configuration file."""
    values = {"name": name, "path": str(BUILTIN_PATH), "plugin_config": json.dumps({"capacity": CAPACITY}), **options}
    return "\n".join(["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())])


@contextmanager
def toy_server(folder: Path, *arguments: str, tables: str = "") -> Iterator[FaultServer]:
    """Start a server with toy workers: one model, or those of `tables`."""
    if tables:
        config = folder / "config.toml"
        config.write_text(tables, "utf-8")
        arguments = ("--config", str(config), *arguments)
    with FaultServer(folder / "spool", "--log_level", "error", *arguments) as server:
        yield server


def echo_cost(server: FaultServer, client: httpx.Client, requests: int = REQUESTS, **fields: object) -> Cost:
    """Return the cost of a small edit, after some that are not measured."""
    for _ in range(requests // 10):
        edit(client, "echo x", **fields)

    def send() -> None:
        for _ in range(requests):
            edit(client, "echo x", **fields)

    return cost_of(server, send, requests)


def by_clients(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with as many clients as the value says."""
    with toy_server(folder, "--queue_limit", "1000") as server, server.client() as client:
        for clients in values:
            with ThreadPoolExecutor(clients) as pool:

                def send(pool: ThreadPoolExecutor = pool) -> None:
                    for _ in pool.map(lambda _: edit(client, "echo x"), range(REQUESTS * 2)):
                        pass

                send()
                yield cost_of(server, send, REQUESTS * 2)


def by_upload(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with an upload of as many MiB as the value says."""
    with toy_server(folder) as server, server.client(TIMEOUT_S) as client:
        for size in values:
            content = TINY_PNG + bytes(size * MIB - len(TINY_PNG))
            count = UPLOADS * max(1, 16 // size)

            def send(content: bytes = content, count: int = count) -> None:
                for _ in range(count):
                    edit(client, "crc", content)

            send()
            yield cost_of(server, send, count * size)


def by_waiting(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure while as many jobs wait at another model as the value says."""
    tables = f"default_model = 'toy'\n{toy_table('toy')}\n{toy_table('slow', queue_limit=1000, replicas=1)}\n"
    for waiting in values:
        with toy_server(folder, tables=tables) as server, ExitStack() as stack:
            client = stack.enter_context(server.client(TIMEOUT_S))
            server.until(lambda: server.fetch("/v3/models/slow")[1]["ready"])
            body = json.dumps({"model": "slow", "prompt": "sleep 100"})
            for _ in range(waiting):
                other = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", server.port)))
                other.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
            server.until(lambda: server.fetch("/v3/models/slow")[1]["queued"] >= waiting - CAPACITY)  # noqa: B023
            yield echo_cost(server, client)


def by_models(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with as many resident models as the value says."""
    for count in values:
        tables = "\n".join(toy_table(f"toy{number}") for number in range(count))
        with toy_server(folder, tables=f"default_model = 'toy0'\n{tables}\n") as server, server.client() as client:
            server.until(lambda: len(server.workers()) == count)  # noqa: B023 - it is called here
            yield echo_cost(server, client)


def by_keys(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with as many keys as the value says in each of the two files."""
    for count in values:
        plain, named = folder / "keys", folder / "named.toml"
        plain.write_text("".join(f"sk-{number}\n" for number in range(count)))
        tables = [("measured", KEY), *((f"key{number}", f"named-{number}") for number in range(count - 1))]
        named.write_text(
            "\n".join(
                f"[[key]]\nname = '{name}'\nsha256 = '{hashlib.sha256(key.encode()).hexdigest()}'"
                for name, key in tables
            )
        )
        for path in (plain, named):
            path.chmod(0o600)
        with (
            toy_server(folder, "--api_key_file", str(plain), "--named_keys_file", str(named)) as server,
            server.client() as client,
        ):
            client.headers["Authorization"] = f"Bearer {KEY}"
            yield echo_cost(server, client)


def by_kept(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure requests for URLs after as many kept pictures as the value says."""
    kept = 0
    with (
        toy_server(folder, "--store_dir", str(folder / "kept")) as server,
        server.client() as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def keep(_: int) -> None:
            edit(client, "bytes 100", response_format="url")

        for count in values:
            for _ in pool.map(keep, range(count - kept)):
                pass
            yield echo_cost(server, client, KEPT_REQUESTS, response_format="url")
            kept = count + KEPT_REQUESTS + KEPT_REQUESTS // 10


def builtin_cost(folder: Path, fields: list[dict[str, object]], units: list[int]) -> Iterator[Cost]:
    """Yield the cost of a unit of the built-in model's generations with each of these fields."""
    with (
        LiveServer("--log_level", "error", spool=folder / "spool") as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        for each, count in zip(fields, units, strict=True):

            def send(each: dict[str, object] = each) -> None:
                for number in range(EDITS):
                    document = {"prompt": f"a red circle {number}", "seed": number, **each}
                    check(client.post("/v1/images/generations", json=document))

            send()
            yield cost_of(server, send, EDITS * count)


def by_pictures(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with as many pictures a request as the value says."""
    return builtin_cost(folder, [{"n": n, "steps": 4, "size": "128x128"} for n in values], list(values))


def by_steps(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with as many steps as the value says."""
    return builtin_cost(folder, [{"steps": steps, "size": "128x128"} for steps in values], list(values))


def by_pixels(folder: Path, values: tuple[int, ...]) -> Iterator[Cost]:
    """Measure with pictures whose side is the value."""
    fields: list[dict[str, object]] = [{"steps": 4, "size": f"{side}x{side}"} for side in values]
    return builtin_cost(folder, fields, [side * side for side in values])


CURVES = (
    Curve("clients", (1, 4, 16, 64), by_clients),
    Curve("upload MiB", (1, 4, 16, 64), by_upload),
    Curve("waiting", (1, 32, 256), by_waiting),
    Curve("models", (1, 4, 12), by_models),
    Curve("keys", (10, 100, 5000), by_keys),
    Curve("kept pictures", (100, 1000, 5000), by_kept),
    Curve("n", (1, 2, 5, 10), by_pictures),
    Curve("steps", (2, 8, 32), by_steps),
    Curve("side px", (128, 256, 512), by_pixels),
)


def measure(curve: Curve, result: Result) -> float:
    """Measure one curve once, add its costs and its growth to the result, and return the growth."""
    with tempfile.TemporaryDirectory() as folder:
        costs = list(curve.measure(Path(folder), curve.values))
    for value, cost in zip(curve.values, costs, strict=True):
        result.add("cost of a unit", [cost], case={"curve": curve.quantity, "value": value})
    growth = costs[-1] / min(costs[:-1])
    result.add("growth", [growth], unit="", case={"curve": curve.quantity})
    return growth


def main() -> None:
    """Measure, print the result, and save it if --save or --out is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CURVE", help="only these curves")
    parser.add_argument("--save", action="store_true", help="write a result file")
    parser.add_argument("--out", type=Path, help="write a result file with this path")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - {curve.quantity for curve in CURVES}:
        parser.error(f"no curve {', '.join(sorted(unknown))}; expected {', '.join(c.quantity for c in CURVES)}")
    result = Result("curves", collect(builtin_directory()))
    for _ in range(options.rounds):
        for curve in CURVES:
            if not options.only or curve.quantity in options.only:
                print(f"{curve.quantity}: growth {measure(curve, result):.2f}", flush=True)
    print(result.report())
    if options.save or options.out:
        print(result.save(options.out))


if __name__ == "__main__":
    main()
