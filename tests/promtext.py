"""Reads the metrics of a server."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Samples", "await_samples", "read_samples"]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
PATIENCE_S = 30.0


def read_samples(page: str) -> Samples:
    """Return the value of each sample, by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def sample(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Return the key of a sample."""
    return name, frozenset(labels.items())


def await_samples(client: httpx.Client, is_there: Callable[[Samples], bool]) -> Samples:
    """Read the metrics until a condition holds: some are counted after the client has its response."""
    until = time.monotonic() + PATIENCE_S
    while True:
        page = client.get("/metrics").text
        found = read_samples(page)
        if is_there(found):
            return found
        assert time.monotonic() < until, page
        time.sleep(0.05)
