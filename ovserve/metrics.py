"""What is counted for Prometheus: requests, jobs, stages, workers, spool."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


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

    def watch(
        self, name: str, text: str, labels: list[str], read: Callable[[], Iterable[tuple[list[str], float]]]
    ) -> None:
        """Add a gauge that is read when somebody asks: `read` gives (label values, value) pairs."""

        class _Gauge:
            def collect(self) -> Iterable[Metric]:
                family = GaugeMetricFamily(name, text, labels=labels)
                for values, value in read():
                    family.add_metric(values, value)
                yield family

        self.registry.register(_Gauge())

    def page(self) -> bytes:
        """Everything in the text exposition format."""
        return generate_latest(self.registry)
