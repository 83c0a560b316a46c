"""The parts of one server's API: settings, catalog, dispatcher, store, metrics; shared by the handlers."""

from __future__ import annotations

import time
from collections.abc import Callable

from ovserve.api.control import FleetControl, NoFleet
from ovserve.api.images import Images
from ovserve.api.reloads import ReloadStatus
from ovserve.api.sdapi.endpoints import SdApi
from ovserve.api.status import LastErrors
from ovserve.api.store import Store
from ovserve.api.traces import Traces
from ovserve.dispatch.dispatcher import Dispatcher, ModelStatus
from ovserve.dispatch.model_queue import MODEL_STATES
from ovserve.metrics import Metrics
from ovserve.models.catalog import Catalog
from ovserve.settings.options import Settings
from ovserve.usage import UsageLog

__all__ = ["Service"]


class Service:
    """What the handlers use. Thread-safe: yes, a reload replaces settings and catalog as a whole.

    Args:
        settings: the options.
        catalog: the models.
        dispatcher: runs the jobs.
        reload: reads the configuration again, and starts the new workers. Raises StartupError.
        reload_status: returns the state of the newest reload.
        fleet: loads and unloads models.
        usage: gets one line for each request for pictures; None: there is no usage log.
        traces: makes the spans of requests; None: requests are not traced.

    Attributes:
        is_stopping: the server has begun to shut down: it is not ready, but still serves requests until it drains.
        has_started: the models that `ready_models` selects have been ready once, or have failed.
        started_at: monotonic instant of the server's start.
        last_errors: the newest errors with a status of 500 or more.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        dispatcher: Dispatcher,
        reload: Callable[[], None],
        reload_status: Callable[[], ReloadStatus] = ReloadStatus,
        *,
        fleet: FleetControl | None = None,
        usage: UsageLog | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.settings = settings
        self.reload = reload
        self.reload_status = reload_status
        self.fleet = fleet or NoFleet()
        self.usage = usage
        self.traces = traces
        self.is_stopping = self.has_started = False
        self.started_at = time.monotonic()
        self.last_errors = LastErrors()
        self.catalog = catalog
        self.dispatcher = dispatcher
        self.store = Store(settings)
        self.metrics = Metrics()
        self.images = Images(settings, catalog, dispatcher, self.store, self.metrics)
        self.sdapi = SdApi(self.images)
        self.metrics.watch("ovserve_queued_jobs", self._queued)
        self.metrics.watch("ovserve_running_jobs", self._running)
        self.metrics.watch("ovserve_ready_workers", self._workers)
        self.metrics.watch("ovserve_model_state", self._states)
        self.metrics.watch("ovserve_model_loading_seconds", self._loading_s)
        self.metrics.watch("ovserve_reloads_total", lambda: [([], self.reload_status().number)])
        self._watch_counts()
        self.metrics.watch("ovserve_usage_errors_total", lambda: [([], usage.errors if usage is not None else 0)])
        self.metrics.watch("ovserve_reload_failed", lambda: [([], self.reload_status().state == "failed")])

    def configure(self, settings: Settings, catalog: Catalog) -> None:
        """Replace settings and catalog, for all requests from now on."""
        self.settings, self.catalog = settings, catalog
        self.images.configure(settings, catalog)

    def _watch_counts(self) -> None:
        """Register what the workers count."""

        def count(name: str) -> list[tuple[list[str], float]]:
            return [([model], found.get(name, 0)) for model, found in self.dispatcher.counts().items()]

        self.metrics.watch("ovserve_device_calls_total", lambda: count("calls"))
        self.metrics.watch("ovserve_device_rows_total", lambda: count("rows"))
        self.metrics.watch("ovserve_job_retries_total", lambda: count("retried"))
        self.metrics.watch("ovserve_cache_lookups_total", self._lookups)

    def _lookups(self) -> list[tuple[list[str], float]]:
        pairs = [(cache, result) for cache in ("prompt", "image") for result in ("hits", "misses")]
        counts = self.dispatcher.counts().items()
        return [
            ([model, cache, result], found.get(f"{cache}_{result}", 0))
            for model, found in counts
            for cache, result in pairs
        ]

    def _statuses(self) -> list[ModelStatus]:
        return self.dispatcher.statuses()

    def _queued(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.queued) for status in self._statuses()]

    def _running(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.running) for status in self._statuses()]

    def _workers(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.workers) for status in self._statuses()]

    def _states(self) -> list[tuple[list[str], float]]:
        return [([status.name, state], status.state == state) for status in self._statuses() for state in MODEL_STATES]

    def _loading_s(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.loading_s) for status in self._statuses()]
