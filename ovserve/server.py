"""The server: create the parts, listen, start, announce readiness, reload, drain, stop.

The main thread only waits for signals. SIGTERM, SIGINT and SIGQUIT drain; a second one ends the process at once. SIGHUP
reloads. SIGUSR1 writes the stacks of all threads of all processes into the log. SIGUSR2 is logged and has no effect.
Signals are blocked in every thread and received with sigtimedwait, so that no handler interrupts a critical section.
Spawned processes inherit the mask, so Ctrl-C does not reach them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from pathlib import Path

from ovserve import systemd
from ovserve.api.api import ImagesApi
from ovserve.api.reloads import ModelReload, ReloadStatus
from ovserve.api.store import Store
from ovserve.api.traces import Traces, start_traces
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.errors import ModelsFailed, SettingsError, StartupError
from ovserve.fleet.budget import check_budget
from ovserve.fleet.estimates import Estimates
from ovserve.fleet.fleets import DEATH_CAUSES
from ovserve.fleet.supervisor import Supervisor
from ovserve.folders import user_cache
from ovserve.front.keys import read_admin_keys, read_keys
from ovserve.front.listener import Listener, ListenerGroup
from ovserve.front.tls import read_certificates
from ovserve.hub.background import Pulls
from ovserve.logs import LogLimit, configure_logs, current_level, fields, set_level
from ovserve.metrics import Metrics
from ovserve.models.catalog import Catalog, ServedModel, read_catalog
from ovserve.models.fingerprint import fingerprint
from ovserve.models.plans import EXACT, PLAN_FILE
from ovserve.models.profile import ModelProfile
from ovserve.settings.access import parse_listen
from ovserve.settings.options import ModelSettings, Settings
from ovserve.stacks import log_stacks
from ovserve.usage import UsageLog
from ovserve.watch import Watch, state_of
from ovserve.wire.local.file_pool import MAX_POOLED_FILES
from ovserve.wire.local.launcher import LocalLauncher
from ovserve.wire.local.output import OnOutput
from ovserve.wire.local.spool import Spool, default_directory
from ovserve.wire.pools import Pools
from ovserve.wire.ray.launcher import RayLauncher
from ovserve.worker import main as worker

__all__ = ["Server", "check_settings"]

ENDING_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT))
IGNORED_SIGNALS = frozenset((signal.SIGUSR2,))  # for log rotation in other servers; its default action ends the process
SIGNALS = ENDING_SIGNALS | IGNORED_SIGNALS | {signal.SIGHUP, signal.SIGUSR1}
IDLE_POLL_S = 3600.0  # of the main thread while the server runs; it waits for nothing else than a signal
POLL_S = 0.1  # interval at which the main thread checks progress between signals
REFUSING_POLL_S = 0.01  # once no job is left; under load the moments without an active exchange are short
LAST_RESPONSES_S = 1.0  # for responses still being written when the server stops listening
STOP_TIMEOUT_S = 10.0  # for workers to exit once nothing is in flight
# Enough for any thread count; some libraries iterate over all possible descriptors.
OUTPUT_LINES = 100  # of native libraries that are logged in one interval
SHOWN_IDS = 8  # of requests in such a line
MAX_DESCRIPTORS = 65536
OWN_DESCRIPTORS = 128 + 2 * MAX_POOLED_FILES  # of the front end, its links, and the warm files
ADMIN_PREFIX = "admin "  # of an inherited socket's address: systemd's name of the socket
ADMIN_CONNECTIONS = 32  # of the admin listener: an operator's tools and a few monitors
# Socket, the upload's segment and its mapping, the request's segment, the job's eventfd. Each picture and preview adds
# one.
CONNECTION_DESCRIPTORS = 5

log = logging.getLogger(__name__)


class Server:
    """One front end and all its parts. Call `run` once, from the main thread."""

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        config: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Check the configuration as far as possible without a worker, and bind the port.

        Args:
            settings: the settings.
            reread: reads the settings again, for a reload.
            config: the configuration file, to be watched.
            variables: the environment for pulls from a hub, with its token; None: that of this process.

        Raises:
            StartupError: a model directory is wrong, the port is taken, the spool directory cannot be used.
        """
        self._inherited = _inherit()
        self._pulls = Pulls(os.environ if variables is None else variables, self._try_reload)
        settings, pending = self._pulls.resolve(_with_inherited(settings, self._inherited))
        self._settings = settings
        self._reread: Callable[[], Settings] = lambda: _with_inherited(reread(), self._inherited)
        self._config = config
        self._watch = Watch(self._watched_state, self._try_reload, settings.watch_interval_s)
        self._reloading = threading.Lock()
        self._serving = threading.Lock()  # guards the API's settings and catalog, which two threads replace
        self._is_announced = False
        self._newest_reload = ReloadStatus()  # without its models, which the supervisor reports
        self._shown_failure = ""  # of a reload, in the status line of the service manager
        self._reload_wanted = threading.Event()
        self._reloader: threading.Thread | None = None
        # Block before the resource tracker starts: it inherits the mask (a SIGHUP to the group would end it). Block
        # again
        # afterwards: its start unblocks SIGINT and SIGTERM in this thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        _raise_descriptor_limit(settings)
        catalog = dataclasses.replace(_read_models(settings), pending=pending)
        self._spool = Spool(
            settings.spool_dir or default_directory(),
            settings.spool_bytes,
            settings.spool_fallback_dir,
            settings.spool_warm_bytes,
        )
        if self._spool.capacity_bytes < settings.max_body_bytes:
            log.warning(
                "the spool is smaller than max_body_bytes: larger requests get 413",
                extra=fields(
                    spool=self._spool.directory.parent,
                    bytes=self._spool.capacity_bytes,
                    max_body_bytes=settings.max_body_bytes,
                ),
            )
        self._output_limit = LogLimit("lines of native libraries", lines=OUTPUT_LINES)
        self._usage: UsageLog | None = None
        self._traces: Traces | None = None
        try:
            self._traces = start_traces() if settings.traces else None
            if settings.usage_log is not None:
                self._usage = UsageLog(settings.usage_log, settings.usage_log_bytes, settings.usage_log_files)
            self._dispatcher = Dispatcher(self._spool, settings)
            self._supervisor = Supervisor(
                settings,
                _profiles(catalog),
                self._dispatcher,
                _pools(settings, self._spool, self._note_output),
                self._note_serving,
                estimates=Estimates(_measurements_file()),
            )
            self._api = ImagesApi(
                settings,
                catalog,
                self._dispatcher,
                self.reload,
                self.reload_status,
                fleet=self._supervisor,
                usage=self._usage,
                traces=self._traces,
            )
            self._supervisor.on_outcome = self._note_outcome
            _watch(self._api.metrics, self._spool, self._supervisor)
            self._listeners = self._listen(settings)
        except BaseException:
            self._spool.close()
            if self._usage is not None:
                self._usage.close()
            if self._traces is not None:
                self._traces.stop()
            raise

    def _note_output(self, worker_name: str, line: str) -> None:
        """Log a line of a worker's native libraries, with the requests that the worker holds. Thread-safe: yes."""
        jobs = self._dispatcher.jobs_of(worker_name)
        values = {"id": jobs[0]} if len(jobs) == 1 else {"ids": ",".join(jobs[:SHOWN_IDS])} if jobs else {}
        self._output_limit.log(log, logging.WARNING, "native: %s", line, worker=worker_name, **values)

    def _listen(self, settings: Settings) -> list[Listener]:
        """Return the listeners; the admin listener is the last. Raises StartupError."""
        group = ListenerGroup(settings)
        listeners: list[Listener] = []
        try:
            for text in settings.listen or [""]:
                address = parse_listen(text) if text else None
                inherited = self._inherited.get(text)
                listeners.append(
                    Listener(settings, self._api, self._spool, address=address, group=group, inherited=inherited)
                )
            if admin := parse_listen(settings.admin_listen):
                operators = dataclasses.replace(settings, max_connections=ADMIN_CONNECTIONS)
                inherited = self._inherited.get(f"{ADMIN_PREFIX}{settings.admin_listen}")
                listeners.append(Listener(operators, self._api, self._spool, admin, inherited=inherited))
        except BaseException:
            for listener in listeners:
                listener.stop(0)
            raise
        return listeners

    def run(self) -> int:
        """Serve until a signal; return the exit code. Raises StartupError when no model can be served."""
        self._supervisor.start()
        self._api.store.start()
        for listener in self._listeners:
            listener.start()
        self._pulls.start()
        if self._settings.watch:
            self._watch.start()
        try:
            if not self._await_ready():
                return 0
            for listener in self._listeners:
                if not listener.is_admin:
                    _print_line(f"ready {listener.url}")
            self._is_announced = self._api.has_started = True
            self._announce()
            self._await_end()
            self._drain()
        finally:
            self._stop()
        return 0

    def _await_ready(self) -> bool:
        """Wait until a model can serve, and those that `ready_models` selects; return False if a signal came first.

        Raises:
            ModelsFailed: all models have failed.
        """
        while not self._supervisor.wait_ready(Deadline.after(0)) or self._api.awaited_models():
            # In this order: a reload that takes over clears the failure before it is settled.
            is_settled = self._supervisor.wait_reloaded(Deadline.after(0))
            statuses = self._supervisor.status().values()
            if is_settled and statuses and all(status.failed for status in statuses):
                raise ModelsFailed("; ".join(f"model {status.name}: {status.reason}" for status in statuses))
            pending = self._api.catalog.pending.values()
            if not statuses and pending and all(model.state.has_failed for model in pending):
                raise ModelsFailed("; ".join(f"model {model.name}: {model.reason}" for model in pending))
            number = self._next_signal(POLL_S)
            if number == signal.SIGHUP:
                self._reload_on_signal()
            elif number in ENDING_SIGNALS:
                return False
        return True

    def _await_end(self) -> None:
        while True:
            number = self._next_signal(IDLE_POLL_S)
            if number is not None and number in ENDING_SIGNALS:
                settings = self._settings
                log.info(
                    "draining",
                    extra=fields(
                        signal=number.name, delay_s=settings.shutdown_delay_s, grace_s=settings.grace_period_s
                    ),
                )
                return
            if number == signal.SIGHUP:
                self._reload_on_signal()

    def _next_signal(self, timeout_s: float) -> signal.Signals | None:
        """Return the next signal, or None at the timeout. One that only writes to the log is returned too."""
        number = _next_signal(timeout_s)
        if number == signal.SIGUSR1:
            log_stacks("server")
            self._supervisor.log_stacks()
        return number

    def _reload_on_signal(self) -> None:
        """Begin a reload in a thread, so that a reload in progress does not hold up SIGTERM.

        Signals that come during a reload cause one more, whatever their number.
        """
        self._reload_wanted.set()
        if self._reloader is None:
            self._reloader = threading.Thread(target=self._reload_while_wanted, name="reload", daemon=True)
            self._reloader.start()

    def _reload_while_wanted(self) -> None:
        while True:
            self._reload_wanted.wait()
            self._reload_wanted.clear()
            self._try_reload()

    def _try_reload(self) -> None:
        """Reload. Failures are only logged."""
        try:
            self.reload()
        except StartupError as error:
            log.error("reload failed, the old configuration stays: %s", error)  # noqa: TRY400 - a traceback adds nothing
        except Exception:  # a bug must not end a running server
            log.exception("reload failed, the old configuration stays")

    def reload(self) -> None:
        """Read the configuration again; new workers take over when they are ready. Thread-safe: yes, one at a time.

        Limits of the server take effect at once. Options of a model take effect when its new workers take over, and not
        at all if they fail. Options that are fixed at start are named in the log.

        Raises:
            StartupError: the new configuration is wrong; nothing was changed.
        """
        with self._reloading:
            if self._api.is_stopping:
                raise StartupError("the server is shutting down")
            if self._is_announced:
                systemd.notify_reloading()
            number = self._newest_reload.number + 1
            self._newest_reload = ReloadStatus(number, is_reading=True)
            try:
                settings, pending = self._pulls.resolve(self._reread())
                catalog, keys, admin_keys = _read_models(settings), read_keys(settings), read_admin_keys(settings)
                certificates = read_certificates(settings)
                catalog = dataclasses.replace(catalog, pending=pending)
                if settings.log_format != self._api.settings.log_format:
                    configure_logs(settings.log_level, settings.log_format)
                elif settings.log_level != current_level():  # also if an operator has changed it since
                    set_level(settings.log_level)
                self._dispatcher.set_log_level(settings.log_level)
                self._supervisor.reload(settings, _profiles(catalog))
                with self._serving:
                    self._api.configure(settings, self._api.catalog.announcing(catalog))
                if self._listeners[0].access.keys and not keys:
                    log.warning("no API key is configured any more: requests without a key are served")
                for listener in self._listeners:
                    # Where it listens, and so what the rules protect, is fixed at start.
                    fixed_places = {name: getattr(self._settings, name) for name in ("listen", "admin_listen")}
                    listener.configure(dataclasses.replace(settings, **fixed_places), keys, admin_keys, certificates)
                log.info("reloaded", extra=fields(models=", ".join(catalog.models), api_keys=len(keys)))
                if fixed := _fixed(self._settings, settings):
                    log.warning("changed options that take effect at the next start: %s", ", ".join(fixed))
                self._newest_reload = ReloadStatus(number)
            except BaseException as error:
                self._newest_reload = ReloadStatus(number, error=str(error) or type(error).__name__)
                raise
            finally:
                self._announce()

    def reload_status(self) -> ReloadStatus:
        """Return the state of the newest reload. Thread-safe: yes."""
        newest = self._newest_reload
        if not newest.number or newest.error or newest.is_reading:
            return newest
        outcomes = self._supervisor.outcomes().items()
        models = {name: ModelReload(outcome.state, outcome.reason) for name, outcome in outcomes}
        return dataclasses.replace(newest, models=models)

    def _note_outcome(self) -> None:
        """Show in the service manager that a reload has failed, or no longer. Runs in: the supervisor thread."""
        failure = self.reload_status().failure
        if failure != self._shown_failure and self._is_announced and not self._api.is_stopping:
            self._shown_failure = failure
            systemd.notify_status(self._status_line())

    def _status_line(self) -> str:
        """Return the line that `systemctl status` shows."""
        failure = self._shown_failure = self.reload_status().failure
        return "serving " + ", ".join(self._api.catalog.models) + (f"; reload failed: {failure}" if failure else "")

    def _note_serving(self, profile: ModelProfile, model: ModelSettings) -> None:
        """Switch the catalog to a model whose new workers have taken over. Runs in: the supervisor thread."""
        with self._serving:
            self._api.configure(self._api.settings, self._api.catalog.with_serving(ServedModel(profile, model)))

    def _announce(self) -> None:
        """Report readiness to systemd, once a model is ready and while the server does not drain."""
        if self._is_announced and not self._api.is_stopping:
            systemd.notify_ready(self._status_line())

    def _watched_state(self) -> str:
        """Return a text that changes when a file that a reload reads has changed. Runs in: the watch thread."""
        settings = self._api.settings
        named = [self._config, settings.api_key_file, settings.named_keys_file, settings.admin_key_file]
        served = list(self._api.catalog.models.values())
        models = [fingerprint(model.profile.directory, model.limits.cache_dir) for model in served]
        named += [model.profile.directory / PLAN_FILE for model in served if model.limits.plan != EXACT]
        return "\n".join([state_of([path for path in named if path is not None]), *models])

    def _drain(self) -> None:
        """Reject new jobs and wait for those in flight, up to the grace period. A second signal ends the process.

        During `shutdown_delay_s` before that, only readiness is false: load balancers stop sending requests here.
        """
        self._api.is_stopping = True
        for listener in self._listeners:
            listener.closes_connections = True
        systemd.notify_stopping()
        delay = Deadline.after(self._settings.shutdown_delay_s)
        while not delay.is_expired():
            self._abort_on_signal(min(POLL_S, delay.remaining()))
        self._dispatcher.drain()
        for listener in self._listeners:
            listener.is_draining = True
        grace = Deadline.after(self._settings.grace_period_s)
        while self._active_exchanges() and not grace.is_expired():
            poll_s = POLL_S if self._dispatcher.in_flight() else REFUSING_POLL_S
            self._abort_on_signal(poll_s)

    def _abort_on_signal(self, timeout_s: float) -> None:
        """Wait for a signal; a second one that ends the server ends the process at once."""
        if self._next_signal(timeout_s) in ENDING_SIGNALS:
            log.warning("second signal: aborting", extra=fields(in_flight=self._active_exchanges()))
            self._supervisor.stop(Deadline.after(0))
            self._spool.close()
            os._exit(1)

    def _active_exchanges(self) -> int:
        return sum(listener.active_exchanges for listener in self._listeners)

    def _stop(self) -> None:
        """Stop all parts. Jobs over the grace period get an error response before their connections are closed."""
        self._watch.stop()
        self._dispatcher.drain()
        self._pulls.stop()
        self._supervisor.stop(Deadline.after(STOP_TIMEOUT_S if not self._active_exchanges() else 0))
        self._output_limit.stop()
        self._dispatcher.close()
        for listener in self._listeners:
            listener.stop(LAST_RESPONSES_S)  # also for requests that arrived after the last check
        self._api.store.close()
        self._spool.close()
        if self._usage is not None:
            self._usage.close()
        if self._traces is not None:
            self._traces.stop()
        left = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
        if left:
            log.debug("threads still running: %s", ", ".join(left))


# Options that a reload changes; all others are fixed at start.
RELOADED = frozenset((
    "models", "ignored", "default_pool", "default_model",
    "ready_models", "max_images", "max_image_pixels", "max_image_side_px",
    "max_prepared_bytes", "default_timeout_s", "sdapi_previews",
    "max_timeout_s", "public_url", "load_timeout_s", "hang_limit_s", "idle_hang_limit_s", "terminate_timeout_s",
    "restart_delay_s", "max_restart_delay_s", "crash_loop_limit", "failed_retry_s", "min_resident_s",
    "memory_budget_bytes", "cache_bytes", "keep_alive_max_s",
    "api_key", "api_key_file", "named_keys_file",
    "admin_key", "admin_key_file", "tls_certificate", "tls_key", "tls_client_ca",
    "allowed_hosts", "log_level", "log_format", "decode_cpu_limit_s",
    "decode_memory_limit_bytes",
))  # fmt: skip


def _fixed(old: Settings, new: Settings) -> list[str]:
    """Return the names of changed options that a reload does not apply."""
    names = (entry.name for entry in dataclasses.fields(Settings) if entry.name not in RELOADED)
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _inherit() -> dict[str, socket.socket]:
    """Return the sockets of socket activation by address, as in `listen`; the one named `admin` begins with `admin `.

    Raises:
        StartupError: one of them cannot be used.
    """
    try:
        found = systemd.inherited_sockets()
    except OSError as error:
        raise StartupError(f"socket activation: {error.strerror}") from None
    sockets = {}
    for name, taken in found:
        address = taken.getsockname()
        if taken.family == socket.AF_UNIX:
            text = f"unix:{address}"
        else:
            text = f"[{address[0]}]:{address[1]}" if taken.family == socket.AF_INET6 else f"{address[0]}:{address[1]}"
        sockets[ADMIN_PREFIX + text if name == "admin" else text] = taken
    return sockets


def _with_inherited(settings: Settings, sockets: Mapping[str, socket.socket]) -> Settings:
    """Return the settings with the addresses of inherited sockets in place of those configured."""
    main = tuple(text for text in sockets if not text.startswith(ADMIN_PREFIX))
    admin = [text for text in sockets if text.startswith(ADMIN_PREFIX)]
    if main:
        settings = dataclasses.replace(settings, listen=main)
    if admin:
        settings = dataclasses.replace(settings, admin_listen=admin[0].removeprefix(ADMIN_PREFIX))
    return settings


def _pools(settings: Settings, spool: Spool, on_output: OnOutput) -> Pools:
    """Return the launchers of all pools. The one of the cluster starts nothing before it has to start a worker."""
    blobs = spool.worker_blobs()
    return Pools(
        {
            "local": LocalLauncher(worker.main, blobs, on_output),
            "ray": RayLauncher(worker.main, blobs, settings.ray_address, settings.place_timeout_s),
        }
    )


def _raise_descriptor_limit(settings: Settings) -> None:
    """Raise the soft limit of descriptors to the hard one; the usual 1024 are for programs that call select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    limit = max(limit, soft)
    spare = settings.overflow_connections + settings.linger_connections
    needed = OWN_DESCRIPTORS + spare + CONNECTION_DESCRIPTORS * settings.max_connections
    if settings.admin_listen:
        needed += spare + ADMIN_CONNECTIONS * CONNECTION_DESCRIPTORS
    if limit < needed:
        log.warning(
            "max_connections may need more descriptors than this process is allowed",
            extra=fields(limit=limit, needed=needed, max_connections=settings.max_connections),
        )


def _print_line(line: str) -> None:
    """Print one line to standard output. A closed pipe or a full disk must not end the server."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("standard output cannot be written", extra=fields(why=str(error)))
        # The line stays in the buffer; flushing it at exit would fail and change the exit code to 120.
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _watch(metrics: Metrics, spool: Spool, supervisor: Supervisor) -> None:
    """Register the metrics of parts that the API does not know."""
    metrics.watch("ovserve_spool_bytes", lambda: [([], spool.used_bytes)])
    metrics.watch("ovserve_spool_warm_bytes", lambda: [([], spool.file_pool.size_bytes)])
    metrics.watch("ovserve_spool_free_bytes", lambda: [([], spool.free_bytes)])
    metrics.watch("ovserve_spool_limit_bytes", lambda: [([], spool.capacity_bytes)])
    metrics.watch("ovserve_node_workers", lambda: [([*key], n) for key, n in supervisor.node_workers().items()])
    metrics.watch("ovserve_model_loads_total", lambda: [([name], n) for name, n in supervisor.loads().items()])
    metrics.watch("ovserve_model_unloads_total", lambda: [([name], n) for name, n in supervisor.unloads().items()])
    metrics.watch(
        "ovserve_model_memory_bytes", lambda: [([name], it.used_bytes) for name, it in supervisor.memory().items()]
    )
    metrics.watch(
        "ovserve_model_expected_bytes", lambda: [([name], it.worker_bytes) for name, it in supervisor.memory().items()]
    )
    metrics.watch("ovserve_memory_bytes", lambda: [([], supervisor.memory_bytes())])
    metrics.watch("ovserve_memory_budget_bytes", lambda: [([], supervisor.budget_bytes())])
    metrics.watch(
        "ovserve_worker_deaths_total",
        lambda: [
            ([name, cause], supervisor.deaths().get((name, cause), 0))
            for name in supervisor.restarts()
            for cause in DEATH_CAUSES
        ],
    )
    metrics.watch(
        "ovserve_process_memory_bytes", lambda: [([name], used) for name, used in supervisor.process_memory().items()]
    )
    metrics.watch("ovserve_worker_restarts_total", lambda: [([name], n) for name, n in supervisor.restarts().items()])


def check_settings(settings: Settings) -> tuple[Catalog, int]:
    """Read what the settings name, as a start does, and start nothing.

    Returns:
        The models, and the number of API keys.

    Raises:
        StartupError: a model's directory, a file with keys or the store's directory cannot be used.
    """
    Store(settings)
    read_admin_keys(settings)
    read_certificates(settings)
    settings, pending = Pulls({}, lambda: None).resolve(settings)
    return dataclasses.replace(_read_models(settings), pending=pending), len(read_keys(settings))


def _read_models(settings: Settings) -> Catalog:
    """Return the models, checked against the memory budget. Raises ModelError and SettingsError."""
    for model in settings.models:
        if model.pool == "ray" and importlib.util.find_spec("ray") is None:
            raise SettingsError(f"model {model.name}: pool = ray needs a package: pip install 'ovserve[ray]'")
    catalog = read_catalog(settings)
    for sentence in check_budget(settings, _profiles(catalog)):
        log.warning(sentence)
    return catalog


def _measurements_file() -> Path | None:
    """Return the file of the measured memory of workers, or None if the user has no folder for it."""
    try:
        return user_cache("cache_dir") / "measured.json"
    except SettingsError:
        return None


def _profiles(catalog: Catalog) -> dict[str, ModelProfile]:
    return {name: model.profile for name, model in catalog.models.items()}


def _next_signal(timeout_s: float) -> signal.Signals | None:
    """Return the next signal, or None at the timeout. An ignored one is only logged, and returned."""
    taken = signal.sigtimedwait(SIGNALS, timeout_s)
    if taken is None:
        return None
    number = signal.Signals(taken.si_signo)
    if number in IGNORED_SIGNALS:
        log.info("signal ignored", extra=fields(signal=number.name))
    return number
