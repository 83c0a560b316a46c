"""Metrics in the Prometheus format: requests, jobs, stages, keys, workers, spool, processes.

Labels have few values: rows of the table of routes, names of models, states, and at most MAX_KEYS names of keys.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics

from ovserve import __version__

__all__ = ["CONTENT_TYPE", "MAX_KEYS", "WATCHED", "Metrics", "Watched", "exemplar_of"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_KEYS = 1000  # names of keys in labels since the start; a reload may bring others
# No key can have these names.
NO_KEY, UNNAMED_KEY, OTHER_KEY = "(none)", "(unnamed)", "(other)"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)  # 10 ms to 10 min
_STEP_SECONDS = (0.001, 0.0025, *_SECONDS)  # a step of a small model takes milliseconds


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
    "ovserve_node_workers": Watched("Ready workers on the nodes of a Ray cluster.", ("model", "node")),
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
    "ovserve_worker_deaths_total": Watched(
        "Deaths of workers by model and cause: load (the model could not be loaded), memory and hang (killed for it), "
        "overdue (did not exit in time), broken (sent something invalid, or ignored a cancellation), crash.",
        ("model", "cause"),
        is_counter=True,
    ),
    "ovserve_job_retries_total": Watched(
        "Jobs that were requeued because a worker died with them, by model.", ("model",), is_counter=True
    ),
    "ovserve_process_memory_bytes": Watched(
        "Measured memory of the front end (`server`), and of each worker with its children (`MODEL/INDEX`).",
        ("process",),
    ),
    "ovserve_device_calls_total": Watched("Denoising calls by model.", ("model",), is_counter=True),
    "ovserve_device_rows_total": Watched(
        "Rows in these calls; rows for each call are the batch. A picture with guidance has two.",
        ("model",),
        is_counter=True,
    ),
    "ovserve_cache_lookups_total": Watched(
        "Lookups of encoded prompts and images in the caches of workers, by model, cache (prompt, image) and result "
        "(hits, misses).",
        ("model", "cache", "result"),
        is_counter=True,
    ),
    "ovserve_usage_errors_total": Watched("Lines of the usage log that could not be written.", is_counter=True),
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
            "Time of settled jobs by stage (queue, prepare, denoise, finish), model, route and final state; only done "
            "jobs have more than the time in the queue.",
            ["model", "stage", "route", "state"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.steps = Histogram(
            "ovserve_denoise_step_seconds",
            "Denoising time of a done job, divided by its steps.",
            ["model"],
            buckets=_STEP_SECONDS,
            registry=self.registry,
        )
        self.headers = Histogram(
            "ovserve_headers_seconds",
            "Time from the head of a request to the head of its response.",
            ["route", "model", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.requests = Histogram(
            "ovserve_request_seconds",
            "Time from the head of a request to the end of its response. Outcomes: ok, client_error, rate_limited "
            "(429), server_error, gone (the client closed). Without a model for other requests than for pictures.",
            ["route", "model", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pixels = Counter(
            "ovserve_pixels", "Pixels of finished pictures by model.", ["model"], registry=self.registry
        )
        self.received_bytes = Counter(
            "ovserve_received_bytes", "Content of requests by route.", ["route"], registry=self.registry
        )
        self.sent_bytes = Counter("ovserve_sent_bytes", "Responses by route.", ["route"], registry=self.registry)
        self.key_requests = Counter(
            "ovserve_key_requests",
            f"Requests for pictures by named key and outcome; {NO_KEY}: without a key, {UNNAMED_KEY}: with a key of "
            f"`api_key` or `api_key_file`, {OTHER_KEY}: more than {MAX_KEYS} names.",
            ["key", "outcome"],
            registry=self.registry,
        )
        self.key_pictures = Counter(
            "ovserve_key_pictures", "Finished pictures by named key.", ["key"], registry=self.registry
        )
        self.key_pixels = Counter(
            "ovserve_key_pixels", "Pixels of finished pictures by named key.", ["key"], registry=self.registry
        )
        self.build = Gauge(
            "ovserve_build_info",
            "1; the labels are the versions of the server, the interpreter and OpenVINO GenAI.",
            ["version", "python", "openvino_genai"],
            registry=self.registry,
        )
        self.build.labels(__version__, platform.python_version(), _installed("openvino-genai")).set(1)
        ProcessCollector(registry=self.registry)
        self._keys: set[str] = set()
        self._keys_lock = threading.Lock()

    def key_label(self, name: str, *, is_verified: bool) -> str:
        """Return the label of a key: its name, if it is a named one and there are not too many."""
        if not name:
            return UNNAMED_KEY if is_verified else NO_KEY
        with self._keys_lock:
            if name not in self._keys and len(self._keys) >= MAX_KEYS:
                return OTHER_KEY
            self._keys.add(name)
        return name

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

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics and their media type: OpenMetrics, which has exemplars, if the field Accept names it.

        Else the text format of Prometheus.
        """
        if "application/openmetrics-text" in accept:
            generate: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest
            return generate(self.registry), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE


def exemplar_of(trace_id: str) -> dict[str, str] | None:
    """Return the exemplar of an observation: the trace of its request, if there is one."""
    return {"trace_id": trace_id} if trace_id else None


def _installed(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
