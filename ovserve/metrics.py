"""Metrics in the Prometheus format: requests, jobs, stages, workers, spool."""

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
    """A metric whose value is read at each scrape."""

    text: str
    labels: tuple[str, ...] = ()
    is_counter: bool = False  # never decreases; its name ends with `_total`


WATCHED = {
    "ovserve_queued_jobs": Watched("Waiting jobs by model.", ("model",)),
    "ovserve_running_jobs": Watched("Jobs held by workers, by model.", ("model",)),
    "ovserve_ready_workers": Watched("Ready workers by model.", ("model",)),
    "ovserve_model_state": Watched("1 for the state that a model is in, 0 for the others.", ("model", "state")),
    "ovserve_model_loading_seconds": Watched("Time for which a model has been loading; 0 in other states.", ("model",)),
    "ovserve_model_loads_total": Watched("Loads of a model that have ended with a ready worker.", ("model",), True),
    "ovserve_model_unloads_total": Watched("Models unloaded while they stayed configured.", ("model",), True),
    "ovserve_model_memory_bytes": Watched("Measured memory of a model's workers.", ("model",)),
    "ovserve_model_expected_bytes": Watched("Memory that one worker of a model is expected to take.", ("model",)),
    "ovserve_memory_bytes": Watched("Measured memory of the server and its workers."),
    "ovserve_memory_budget_bytes": Watched("The option memory_budget_bytes; 0: no limit."),
    "ovserve_worker_restarts_total": Watched(
        "Restarts of workers that died or were killed, by model.", ("model",), is_counter=True
    ),
    "ovserve_reloads_total": Watched("Reloads since the start, failed ones included.", is_counter=True),
    "ovserve_reload_failed": Watched("1 if the newest reload failed, else 0."),
    "ovserve_spool_bytes": Watched("Bytes of uploads, requests and results in flight in the spool."),
    "ovserve_spool_warm_bytes": Watched("Bytes of spool files kept mapped for the next uploads."),
    "ovserve_spool_free_bytes": Watched(
        "Bytes still available in the spool: what its limit or the free space of its file systems allows, if less."
    ),
    "ovserve_spool_limit_bytes": Watched(
        "Capacity of the spool in bytes: spool_bytes, or the total size of its file systems if that is less."
    ),
}


class Metrics:
    """The metrics of one server. Thread-safe: yes (locks of prometheus_client)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "ovserve_http_responses",
            "Responses by route and status code; a stream that has ended early counts under its error's status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.jobs = Counter(
            "ovserve_jobs", "Settled jobs by model and final state.", ["model", "state"], registry=self.registry
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
        """Register a metric of `WATCHED`; `read` returns pairs of label values and value."""
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
        """Return all metrics in the text exposition format."""
        return generate_latest(self.registry)
