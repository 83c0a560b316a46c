"""Puts the parts together: listen, start, announce ready, drain, stop.

The main thread waits for signals and for nothing else. SIGTERM and SIGINT drain, a second one ends at once; SIGHUP reloads.
They are blocked in every thread and taken with sigtimedwait, so that no handler ever runs between two bytecodes of
somebody's critical section; processes that the supervisor spawns inherit the mask and never see Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker

from ovserve import systemd
from ovserve.api.routes import ImagesApi
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.errors import ModelError, StartupError
from ovserve.fleet.supervisor import Supervisor
from ovserve.front.keys import read_keys
from ovserve.front.listener import Listener
from ovserve.logs import fields
from ovserve.metrics import Metrics
from ovserve.models.catalog import Catalog, ServedModel, read_catalog
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.spool import Spool, default_directory
from ovserve.wire.local.warm import MOST_FILES
from ovserve.worker import main as worker

__all__ = ["Server"]

SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
POLL_S = 0.1  # how often the main thread looks up between signals while something is under way
REFUSING_POLL_S = 0.01  # once no job is left: between two refusals of a busy server the moment to end is short
LAST_ANSWERS_S = 1.0  # for answers that are on their way when the server stops to listen
STOP_TIMEOUT_S = 10.0  # for processes to end once nothing is in flight
# Enough for any number of threads a machine has; some libraries walk over all that there may be.
MOST_DESCRIPTORS = 65536
OWN_DESCRIPTORS = 128 + 2 * MOST_FILES  # of the front end itself and its links to workers, and of the warm files
# The socket; the upload's segment and its map, the request's segment and the job's eventfd. Each picture and preview adds one.
CONNECTION_DESCRIPTORS = 5

log = logging.getLogger(__name__)


class Server:
    """One front end and everything it owns. `run` is called once, from the main thread."""

    def __init__(self, settings: Settings, reread: Callable[[], Settings]) -> None:
        """Check everything that can be checked without a process, and take the port.

        Args:
            settings: how to run.
            reread: makes the settings anew, for a reload.

        Raises:
            StartupError: a model directory is wrong, the port is taken, the spool directory cannot be used.
        """
        self._settings = settings
        self._reread = reread
        self._reloading = threading.Lock()
        self._serving = threading.Lock()  # over the API's settings and catalogue, which two threads replace
        self._is_announced = False
        # Before the tracker starts, which inherits this (a SIGHUP to the group would end it), and again: its start unblocks SIGINT
        # and SIGTERM in this thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        _raise_descriptor_limit(settings)
        catalog = read_catalog(settings)
        self._spool = Spool(
            settings.spool_dir or default_directory(),
            settings.spool_bytes,
            settings.spool_fallback_dir,
            settings.spool_warm_bytes,
        )
        if self._spool.most_bytes < settings.max_body_bytes:
            log.warning(
                "the spool cannot hold the largest request that is allowed: some will get 413",
                extra=fields(
                    spool=self._spool.directory.parent,
                    bytes=self._spool.most_bytes,
                    max_body_bytes=settings.max_body_bytes,
                ),
            )
        try:
            self._dispatcher = Dispatcher(self._spool, settings)
            self._supervisor = Supervisor(
                settings, _profiles(catalog), self._dispatcher, worker.main, self._note_serving
            )
            self._api = ImagesApi(settings, catalog, self._dispatcher, self.reload)
            _watch(self._api.metrics, self._spool, self._supervisor)
            self._listener = Listener(settings, self._api, self._spool)
        except BaseException:
            self._spool.close()
            raise

    def run(self) -> int:
        """Serve until a signal ends it; the exit code. Raises StartupError when no model can be served."""
        self._supervisor.start()
        self._listener.start()
        try:
            if not self._await_ready():
                return 0
            host = f"[{self._listener.host}]" if ":" in self._listener.host else self._listener.host
            _say(f"ready http://{host}:{self._listener.port}")
            self._is_announced = True
            self._announce()
            self._await_end()
            self._drain()
        finally:
            self._stop()
        return 0

    def _await_ready(self) -> bool:
        """Wait for the first model that has answered its warm-up; False when told to stop before."""
        while not self._supervisor.wait_ready(Deadline.after(0)):
            # First this, then the statuses: who takes over clears the failure then.
            is_settled = self._supervisor.wait_reloaded(Deadline.after(0))
            statuses = self._supervisor.status().values()
            if is_settled and statuses and all(status.failed for status in statuses):
                raise ModelError("; ".join(f"model {status.name}: {status.reason}" for status in statuses))
            number = _next_signal(POLL_S)
            if number == signal.SIGHUP:
                self._obey_reload()
            elif number:
                return False
        return True

    def _await_end(self) -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            if number != signal.SIGHUP:
                log.info(
                    "draining", extra=fields(signal=signal.Signals(number).name, grace_s=self._settings.grace_period_s)
                )
                return
            self._obey_reload()

    def _obey_reload(self) -> None:
        """Reload as told by a signal: nobody is there to hear of a failure but the log."""
        try:
            self.reload()
        except StartupError as error:
            log.error("not reloaded: %s", error)  # noqa: TRY400 - the message says all there is
        except Exception:  # a bug in reading the configuration must not end a server that runs
            log.exception("not reloaded")

    def reload(self) -> None:
        """Read the configuration again; new workers take over when they are ready. Thread-safe: yes, one at a time.

        What bounds every request takes effect at once, what belongs to a model when its new workers take over, and never
        when they fail. What was fixed when the server started is named in the log.

        Raises:
            StartupError: the new configuration is wrong, and nothing was changed.
        """
        with self._reloading:
            if self._is_announced:
                systemd.notify_reloading()
            try:
                settings = self._reread()
                catalog, keys = read_catalog(settings), read_keys(settings)
                self._supervisor.reload(settings, _profiles(catalog))
                with self._serving:
                    self._api.configure(settings, self._api.catalog.announcing(catalog))
                if self._listener.keys and not keys:
                    log.warning("no API key is known any more: everybody is answered")
                self._listener.keys = keys
                log.info("reloaded", extra=fields(models=", ".join(catalog.models), api_keys=len(keys)))
                if fixed := _fixed(self._settings, settings):
                    log.warning("takes effect at the next start: %s", ", ".join(fixed))
            finally:
                self._announce()

    def _note_serving(self, profile: ModelProfile, model: ModelSettings) -> None:
        """A model's new workers have taken over. Runs in: the supervisor thread."""
        with self._serving:
            self._api.configure(self._api.settings, self._api.catalog.with_serving(ServedModel(profile, model)))

    def _announce(self) -> None:
        """Tell systemd that the service answers; not before a model has worked, and not while it goes down."""
        if self._is_announced and not self._dispatcher.is_draining:
            systemd.notify_ready("serving " + ", ".join(self._api.catalog.models))

    def _drain(self) -> None:
        """Take no new jobs, and let those in flight finish within the grace period. A second signal ends the process now."""
        self._dispatcher.drain()
        self._listener.is_draining = True  # a client that is refused is told to come back on another connection
        systemd.notify_stopping()
        grace = Deadline.after(self._settings.grace_period_s)
        while self._listener.active_exchanges and not grace.is_expired():
            poll_s = POLL_S if self._dispatcher.in_flight() else REFUSING_POLL_S
            if _next_signal(poll_s) in (signal.SIGTERM, signal.SIGINT):
                log.warning("second signal: ending now", extra=fields(in_flight=self._listener.active_exchanges))
                self._supervisor.stop(Deadline.after(0))
                self._spool.close()
                os._exit(1)

    def _stop(self) -> None:
        """End everything. Jobs that the grace did not suffice for are answered before their connections are cut."""
        self._dispatcher.drain()
        self._supervisor.stop(Deadline.after(STOP_TIMEOUT_S if not self._listener.active_exchanges else 0))
        self._dispatcher.close()
        self._listener.stop(LAST_ANSWERS_S)  # also for requests that came after the last look at what is active
        self._spool.close()
        left = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
        if left:
            log.debug("threads left: %s", ", ".join(left))


# Options that are read at each request, or by workers and dispatch from what a reload hands them; all others are fixed at start.
RELOADED = frozenset((
    "models", "default_model", "max_images", "max_image_pixels", "max_image_side_px", "default_timeout_s", "max_timeout_s", "public_url",
    "load_timeout_s", "hang_limit_s", "idle_hang_limit_s", "terminate_timeout_s", "restart_delay_s", "max_restart_delay_s",
    "crash_loop_limit", "failed_retry_s", "api_key", "api_key_file",
))  # fmt: skip


def _fixed(old: Settings, new: Settings) -> list[str]:
    """Options that changed and that only a start can bring in."""
    names = (entry.name for entry in dataclasses.fields(Settings) if entry.name not in RELOADED)
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _raise_descriptor_limit(settings: Settings) -> None:
    """Take as many descriptors as the process may have: a login shell's usual 1024 are meant for programs that call select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    limit = max(limit, soft)
    needed = OWN_DESCRIPTORS + settings.overflow_connections + CONNECTION_DESCRIPTORS * settings.max_connections
    if limit < needed:
        log.warning(
            "max_connections may need more descriptors than the limit of this process",
            extra=fields(limit=limit, needed=needed, max_connections=settings.max_connections),
        )


def _say(line: str) -> None:
    """One line on standard output, where nobody need be reading and the disk may be full: that ends no server."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("standard output cannot be written", extra=fields(why=str(error)))
        # The line is still in the buffer, and would turn the exit code into 120 when the interpreter flushes that at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _watch(metrics: Metrics, spool: Spool, supervisor: Supervisor) -> None:
    """Have what the API does not know of shown among its metrics."""
    metrics.watch("ovserve_spool_bytes", lambda: [([], spool.used_bytes)])
    metrics.watch("ovserve_spool_warm_bytes", lambda: [([], spool.warm.size)])
    metrics.watch("ovserve_spool_limit_bytes", lambda: [([], spool.most_bytes)])
    metrics.watch("ovserve_worker_restarts_total", lambda: [([name], n) for name, n in supervisor.restarts().items()])


def _profiles(catalog: Catalog) -> dict[str, ModelProfile]:
    return {name: model.profile for name, model in catalog.models.items()}


def _next_signal(timeout_s: float) -> int | None:
    taken = signal.sigtimedwait(SIGNALS, timeout_s)
    return taken.si_signo if taken else None
