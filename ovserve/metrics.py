"""What is counted for Prometheus: requests, jobs, stages, workers, spool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["CONTENT_TYPE", "WATCHED", "Metrics", "Watched"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Watched:
    """A figure that is read when somebody asks."""

    text: str
    labels: tuple[str, ...] = ()
    is_counter: bool = False  # it never falls, and its name ends with `_total`


WATCHED = {
    "ovserve_queued_jobs": Watched("Jobs that wait, by model.", ("model",)),
    "ovserve_running_jobs": Watched("Jobs that workers hold, by model.", ("model",)),
    "ovserve_ready_workers": Watched("Workers that take jobs, by model.", ("model",)),
    "ovserve_worker_restarts_total": Watched(
        "Workers that died or were killed, and had to be started again, by model.", ("model",), is_counter=True
    ),
    "ovserve_spool_bytes": Watched("Bytes of uploads, requests and results in flight in the spool."),
    "ovserve_spool_warm_bytes": Watched("Bytes of spool files that are kept for the next uploads."),
    "ovserve_spool_limit_bytes": Watched(
        "Bytes that the spool holds at most: spool_bytes, or where that is less the size of its file system and the fallback's together."
    ),
}


class Metrics:
    """The counters of one server. Thread-safe: yes (prometheus_client's own locks)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "ovserve_http_responses", "Answers by route and status code.", ["route", "status"], registry=self.registry
        )
        self.jobs = Counter(
            "ovserve_jobs", "Settled jobs by model and end.", ["model", "state"], registry=self.registry
        )
        self.pictures = Counter("ovserve_pictures", "Finished pictures by model.", ["model"], registry=self.registry)
        self.stages = Histogram(
            "ovserve_stage_seconds",
            "Time of finished jobs by model and stage: queue, prepare, denoise, finish.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def watch(self, name: str, read: Callable[[], Iterable[tuple[list[str], float]]]) -> None:
        """Add a figure of `WATCHED`: `read` gives (label values, value) pairs."""
        watched = WATCHED[name]

        class _Family:
            def collect(self) -> Iterable[Metric]:
                kind = CounterMetricFamily if watched.is_counter else GaugeMetricFamily
                family = kind(name, watched.text, labels=watched.labels)
                for values, value in read():
                    family.add_metric(values, value)
                yield family

        self.registry.register(_Family())

    def page(self) -> bytes:
        """Everything in the text exposition format."""
        return generate_latest(self.registry)
