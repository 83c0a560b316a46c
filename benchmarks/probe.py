"""Fetch a health check at fixed times from a separate process, so that the load generator's threads do not delay it.

with Prober("http://127.0.0.1:8000", "/v2/health/live") as prober:
    ...                       # the load
prober.probes                 # due time and latency of each
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Probe", "Prober"]

ANSWER_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
MAX_PROBES = 1_000_000


@dataclass(frozen=True, slots=True)
class Probe:
    """One health check: due time (`time.monotonic`), seconds from then to the answer, and whether that was a 200."""

    due: float
    latency_s: float
    is_healthy: bool


class Prober:
    """A context manager that fetches a health check until its block ends.

    Attributes:
        probes: in order of time; filled at the end of the block.
    """

    def __init__(self, url: str, path: str, every_s: float = 0.05) -> None:
        self._command = [sys.executable, "-m", "benchmarks.probe", url, path, str(every_s)]
        self.probes: list[Probe] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        assert self._process.stdout
        self._process.stdout.readline()  # wait until the first probe was answered or has failed
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            output, _error = self._process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            self._process.kill()
        if kind is None:
            self.probes = [Probe(*row) for row in json.loads(output)]


def probe(url: str, path: str, every_s: float) -> list[Probe]:
    """Fetch the health check every `every_s` seconds until standard input ends."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=ANSWER_TIMEOUT_S)
    probes: list[Probe] = []
    due, end = time.monotonic(), float("inf")
    while due < end and len(probes) < MAX_PROBES:
        try:
            connection.request("GET", path)
            with connection.getresponse() as answer:
                answer.read()
                is_healthy = answer.status == 200
        except (OSError, http.client.HTTPException):
            connection.close()
            is_healthy = False
        probes.append(Probe(due, time.monotonic() - due, is_healthy))
        if len(probes) == 1:
            print(flush=True)
        due += every_s
        # Probes due before the end are still fetched; otherwise a stall at the end would show in one probe only.
        if end == float("inf") and select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            end = time.monotonic()
    connection.close()
    return probes


if __name__ == "__main__":
    _, url, path, interval = sys.argv
    print(json.dumps([[one.due, one.latency_s, one.is_healthy] for one in probe(url, path, float(interval))]))
