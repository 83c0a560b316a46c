"""`ovserve bench`: measure a running server with a number of clients, each sending one request after another."""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovserve.cli.arguments import ArgumentParser, report_error, usage_error
from ovserve.cli.commands import ExitCode
from ovserve.client.requests import DEFAULT_URL
from ovserve.client.server import File, ImageServer, NoServer, Progress, Refused

__all__ = ["Measurement", "measure", "run"]

_DESCRIPTION = """Measure a running server: a number of clients, each of which sends one request after another (a closed
loop). Prints pictures per second and the percentiles of the time of a request. All requests have different seeds."""
MAX_CLIENTS, MAX_REQUESTS = 256, 100_000
_PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Measurement:
    """What the clients have measured. Thread-safe: yes, one lock.

    Attributes:
        seconds: time of each request that was answered with a picture.
        errors: number of failed requests by message.
        wall_s: from the first request to the end of the last one.
    """

    seconds: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: float) -> None:
        """Add a request that was answered."""
        with self._lock:
            self.seconds.append(seconds)

    def add_error(self, message: str) -> None:
        """Add a request that failed."""
        with self._lock:
            self.errors[message] = self.errors.get(message, 0) + 1

    def document(self) -> dict[str, Any]:
        """Return the result: rates in 1/s, times in seconds."""
        times = sorted(self.seconds)
        return {
            "answered": len(times),
            "failed": sum(self.errors.values()),
            "errors": self.errors,
            "wall_s": round(self.wall_s, 3),
            "pictures_per_s": round(len(times) / self.wall_s, 3) if self.wall_s else 0.0,
            "mean_s": round(statistics.fmean(times), 4) if times else None,
            **{f"p{percent}_s": round(_percentile(times, percent), 4) if times else None for percent in _PERCENTILES},
        }


def run(arguments: Sequence[str]) -> int:
    """Measure, print the result, return the exit code."""
    parser = ArgumentParser("bench", _DESCRIPTION)
    parser.usage = "ovserve bench [URL] [options]"
    parser.add_argument("url", nargs="?", default="", help=f"the server. Default: $OVSERVE_URL, {DEFAULT_URL}")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="requests at once. Default: %(default)s")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="requests in all. Default: %(default)s")
    parser.add_argument("--picture", default="", metavar="FILE", help="edit this picture; without it, generate")
    parser.add_argument("-p", "--prompt", default="a green circle on a blue background", metavar="TEXT")
    parser.add_argument("--model", default="", metavar="NAME")
    parser.add_argument("--size", default="", metavar="WxH")
    parser.add_argument("--steps", default="", metavar="N")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    values = parser.parse(arguments)
    clients, requests = _count(values, "clients", MAX_CLIENTS), _count(values, "requests", MAX_REQUESTS)
    names = {"prompt": "prompt", "model": "model", "size": "size", "steps": "num_inference_steps"}
    fields = {name: str(values[option]) for option, name in names.items() if values[option]}
    try:
        picture = str(values["picture"])
        files = [File("image", Path(picture).name, Path(picture).read_bytes())] if picture else []
        url = str(values["url"] or os.environ.get("OVSERVE_URL") or DEFAULT_URL)
        server = ImageServer(url, os.environ.get("OVSERVE_API_KEY", ""))
        server.models()  # a wrong URL or key is one message, and not one for each request
    except (NoServer, Refused) as error:
        return report_error(str(error), ExitCode.NO_SERVER if isinstance(error, NoServer) else ExitCode.REFUSED)
    except (ValueError, OSError) as error:
        return report_error(str(error), ExitCode.USAGE)
    result = measure(server, fields, files, clients=clients, requests=requests).document()
    print(json.dumps(result) if values["json"] else "\n".join(_lines(result)))
    return ExitCode.OK if not result["failed"] else ExitCode.REFUSED


def _count(values: dict[str, object], name: str, most: int) -> int:
    count = values[name]
    if not isinstance(count, int) or not 1 <= count <= most:
        usage_error(f"--{name}={count}: expected 1 to {most}")
    return count


def measure(
    server: ImageServer, fields: dict[str, str], files: Sequence[File], *, clients: int, requests: int
) -> Measurement:
    """Send the requests and return what was measured. A client waits for its answer before its next request."""
    result, seeds, lock = Measurement(), iter(range(requests)), threading.Lock()

    def work() -> None:
        """Send requests, one after the other, until none is left."""
        while True:
            with lock:
                seed = next(seeds, None)
            if seed is None:
                return
            began_at = time.monotonic()
            try:
                server.run("edits" if files else "generations", {**fields, "seed": str(seed)}, files, _ignore)
            except (NoServer, Refused) as error:
                result.add_error(str(error))
            else:
                result.add(time.monotonic() - began_at)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(clients, requests))]
    began_at = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.wall_s = time.monotonic() - began_at
    return result


def _ignore(_: Progress) -> None:
    pass


def _percentile(times: Sequence[float], percent: int) -> float:
    """Return the smallest of the sorted times that at least `percent` of them do not exceed."""
    return times[max(0, -(-len(times) * percent // 100) - 1)]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['answered']} pictures in {result['wall_s']:.1f} s: {result['pictures_per_s']:.2f} a second"
    if result["answered"]:
        yield "time of a request: " + ", ".join(f"p{each} {result[f'p{each}_s']:.3f} s" for each in _PERCENTILES)
    for message, count in result["errors"].items():
        yield f"failed, {count} times: {message}"
    if sys.stdout.isatty() and result["answered"] < 100:
        yield "(fewer than 100 requests: p99 is the slowest)"
