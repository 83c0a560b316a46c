"""One request for pictures, from form to reply: validate, admit, wait, answer."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Generator

from ovserve.api.exchange import Exchange, Form, JsonReply, Reply, ServerEvent, StreamReply
from ovserve.api.parameters.params import Parameters, parse_parameters
from ovserve.api.parameters.values import check_range, shown
from ovserve.api.replies import (
    completed_event,
    ignored_headers,
    images_reply,
    partial_event,
    progress_comment,
    queue_comment,
)
from ovserve.api.store import Store
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, JobEvent, Partial, Result, State
from ovserve.errors import (
    ApiError,
    ClientGone,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidValue,
    ModelNotFound,
    NotReady,
    StoreFull,
    StoreUnusable,
)
from ovserve.metrics import Metrics, exemplar_of
from ovserve.models.catalog import Catalog
from ovserve.settings.options import Settings
from ovserve.wire.messages import Prepared, Progress

__all__ = ["Images", "base_url_hint", "check_done", "client_of", "job_backstop", "overrun_error"]

STREAM_HEAD_WAIT_S = (
    10.0  # a stream's headers are sent once the job is prepared, or after this; later errors are events
)
# The least time between the end of a body and the head of its stream if the request came through a proxy. Proxies that
# are written in Go (Caddy, Traefik) close the connection to the server, and end the client's stream without an error,
# when the head arrives before they have noted that the body is sent.
PROXY_HEAD_WAIT_S = 0.25
_PROXY_FIELDS = ("x-forwarded-for", "forwarded", "via")
LOADING_HEAD_WAIT_S = 2.0  # the same while the model is loading: the client then sees the progress
WAITING_POLL_S = 1.0  # how often a stream looks what its waiting job waits for
KEEP_ALIVE_S = 15.0  # idle time on a stream before a comment line is sent; clients time out after 300
CATALOG_WAIT_S = 1.0  # a reload replaces the catalog some milliseconds after it has removed a model
DRAINING_RETRY_S = 5  # Retry-After while draining; another or the restarted instance answers by then
BASE_PATH = "/v1"  # of the base URL that messages suggest
OVERRUN_S = 30.0  # the handler gives up if a job is still unsettled this long after its deadline


def base_url_hint(exchange: Exchange) -> str:
    """Return the base URL of the API, for the message to a client whose path is wrong."""
    scheme = "https" if exchange.header("x-forwarded-proto") == "https" else "http"
    return f"the base URL is {scheme}://{exchange.header('host') or 'HOST:PORT'}{BASE_PATH}"


class Images:
    """Serves requests for pictures. Runs in: handler threads. Thread-safe: yes, it holds no state of a request."""

    def __init__(
        self, settings: Settings, catalog: Catalog, dispatcher: Dispatcher, store: Store, metrics: Metrics
    ) -> None:
        self.settings = settings  # a reload replaces settings and catalog as a whole
        self.catalog = catalog
        self._changed = threading.Condition()
        self._dispatcher = dispatcher
        self._store = store
        self._metrics = metrics

    def serve(self, exchange: Exchange, endpoint: str, path_model: str | None) -> Reply:
        """Serve one edit, generation or variation. Raises ApiError and ClientGone."""
        # Checked before the body is read, so that a client that waits for 100-continue gets the error at once.
        if path_model and "/deployments/" not in exchange.path and not self.catalog.name_of(path_model):
            raise ModelNotFound(
                f"The path names {path_model[:200]!r}, which is not a model; {base_url_hint(exchange)}.", param="model"
            )
        form = self.read_form(exchange)  # may take minutes, so catalog and settings are read afterwards
        job, parameters = self._admit_form(exchange, form, endpoint, path_model)
        try:
            if parameters.stream:
                return self._reply_stream(exchange, job, parameters)
            return self._reply_json(exchange, job, parameters)
        except BaseException:
            self.end_job(exchange, job)
            job.close()
            raise

    def _admit_form(
        self, exchange: Exchange, form: Form, endpoint: str, path_model: str | None
    ) -> tuple[Job, Parameters]:
        """Validate a request and admit its job. Raises ApiError.

        A reload may remove the model in between, and give its name to another one: then the request is validated again,
        as if it had come a moment later.
        """
        catalog = self.catalog
        parameters = self._parse(exchange, form, endpoint, path_model)
        try:
            return self.admit(exchange, parameters), parameters
        except (ModelNotFound, NotReady):
            if not self._is_removed(parameters.model.name) or not self._await_catalog(other_than=catalog):
                raise
        parameters = self._parse(exchange, form, endpoint, path_model)
        return self.admit(exchange, parameters), parameters

    def configure(self, settings: Settings, catalog: Catalog) -> None:
        """Replace settings and catalog, for all requests from now on."""
        with self._changed:
            self.settings, self.catalog = settings, catalog
            self._changed.notify_all()

    def _is_removed(self, name: str) -> bool:
        try:
            return self._dispatcher.status(name).reason == "unloading"
        except ModelNotFound:
            return True

    def _await_catalog(self, *, other_than: Catalog) -> bool:
        """Wait for the catalog of a reload that has begun; return whether there is another one."""
        with self._changed:
            return self._changed.wait_for(lambda: self.catalog is not other_than, CATALOG_WAIT_S)

    def _parse(self, exchange: Exchange, form: Form, endpoint: str, path_model: str | None) -> Parameters:
        parameters = parse_parameters(form, endpoint, path_model, self.catalog, self.settings)
        if parameters.response_format == "url" and not self._base_url(exchange):
            raise InvalidValue(
                "response_format is url, but the request has no Host field to build the URL from; send Host, or set "
                "public_url on the server.",
                param="response_format",
            )
        if parameters.response_format == "url":
            self._check_store()
        return parameters

    def read_form(self, exchange: Exchange) -> Form:
        """Read the body of a request for pictures, unless the server drains. Raises ApiError and ClientGone."""
        if self._dispatcher.is_draining:
            raise Draining(
                "The server is shutting down and accepts no new jobs; retry later.", retry_after_s=DRAINING_RETRY_S
            )
        return exchange.read_form()

    def admit(self, exchange: Exchange, parameters: Parameters) -> Job:
        """Admit the job of a validated request. The caller calls `end_job` and closes the job. Raises ApiError."""
        exchange.note("model", parameters.model.name)
        exchange.record.model = parameters.model.name
        if parameters.ignored:
            exchange.note("ignored", ignored_headers(parameters).get("x-ovserve-ignored", ""))
        exchange.take_pictures(parameters.model.name, parameters.request.n, parameters.model.limits.exact_aliases)
        job = Job(
            id=exchange.id,
            model=parameters.model.name,
            client=client_of(exchange),
            request=parameters.request,
            deadline=Deadline.after(self._timeout_s(exchange, parameters)),
            holding=exchange.holding,
            keep_alive_s=parameters.keep_alive_s,
            key_name=exchange.key_name,
            is_traced=bool(exchange.record.trace_id),
        )
        try:
            self._dispatcher.admit(job)
        except BaseException:
            job.close()
            raise
        return job

    def cancel(self, job: Job) -> bool:
        """Cancel a job. Return False when it was settled before. Thread-safe: yes."""
        return self._dispatcher.cancel(job)

    def _timeout_s(self, exchange: Exchange, parameters: Parameters) -> float:
        """Return the time limit: the header field `x-timeout-s`, else the parameter. Raises InvalidValue."""
        text = exchange.header("x-timeout-s")
        if text is None:
            return parameters.timeout_s
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = 0.0
        if not timeout_s > 0:
            raise InvalidValue(
                f"x-timeout-s is {shown(text)}; expected a number of seconds above 0.", param="x-timeout-s"
            )
        check_range("x-timeout-s", timeout_s, None, self.settings.max_timeout_s, "this server")
        return timeout_s

    def end_job(self, exchange: Exchange, job: Job) -> None:
        """Cancel a job if it is not settled, and count it, once. Its segments stay until it is closed."""
        record, metrics = exchange.record, self._metrics
        if record.state:
            return
        if not job.is_settled:
            self._dispatcher.cancel(job)
        record.note_job(job)
        metrics.jobs.labels(job.model, record.state).inc()
        metrics.pictures.labels(job.model).inc(record.pictures)
        metrics.pixels.labels(job.model).inc(record.pixels)
        is_done, exemplar = job.state is State.DONE, exemplar_of(record.trace_id)
        for stage, seconds in record.stages.items() if is_done else (("queue", record.queue_s),):
            metrics.stages.labels(job.model, stage, record.route, record.state).observe(seconds, exemplar)
        if is_done and record.steps:
            metrics.steps.labels(job.model).observe(record.denoise_s / record.steps, exemplar)

    # --- JSON reply -------------------------------------------------------------------------------------------------

    def _reply_json(self, exchange: Exchange, job: Job, parameters: Parameters) -> JsonReply:
        backstop = job_backstop(job)
        while not job.is_settled:
            if not exchange.wait(job.wakeup, backstop):
                raise overrun_error()
            job.take_events()
        prepared = check_done(job)
        urls = self._store_pictures(exchange, job, parameters) if parameters.response_format == "url" else None
        reply = images_reply(job, prepared, parameters, urls)
        self.end_job(
            exchange, job
        )  # now and not with `reply.close`: a client that has its reply finds its job in the metrics
        if urls is not None:
            job.close()  # so that a client that reads slowly does not keep the pictures in the spool
        return reply

    def _base_url(self, exchange: Exchange) -> str:
        """Return the prefix of picture URLs; empty without public_url and Host field."""
        host = exchange.header("host")
        scheme = "https" if exchange.is_secure else "http"
        return self.settings.public_url.rstrip("/") or (f"{scheme}://{host}" if host else "")

    def _check_store(self) -> None:
        """Check before any work that a picture can be stored. Raises StoreFull and StoreUnusable."""
        try:
            self._store.check()
        except OSError as error:
            raise _store_error(error) from None

    def _store_pictures(self, exchange: Exchange, job: Job, parameters: Parameters) -> dict[int, str]:
        """Store all pictures of a job; return the URL of each by picture number. Raises StoreFull and StoreUnusable."""
        base = self._base_url(exchange)
        urls = {}
        for number, result in job.results.items():
            with result.segment.view[: result.size] as picture:
                try:
                    name = self._store.keep(picture, parameters.request.output_format)
                except OSError as error:
                    raise _store_error(error) from None
            urls[number] = f"{base}/v1/images/files/{name}"
        return urls

    # --- stream reply -----------------------------------------------------------------------------------------------

    def _reply_stream(self, exchange: Exchange, job: Job, parameters: Parameters) -> StreamReply:
        """Wait until the job is prepared, then return the stream: errors in the request are then plain HTTP errors."""
        head_deadline = Deadline.after(LOADING_HEAD_WAIT_S if self._load_comment(job) else STREAM_HEAD_WAIT_S)
        proxy_hold = Deadline.after(PROXY_HEAD_WAIT_S if any(map(exchange.header, _PROXY_FIELDS)) else 0)
        early: list[JobEvent] = []
        while job.prepared is None and not job.is_settled:
            if not exchange.wait(job.wakeup, head_deadline):
                break
            early += job.take_events()
        while not proxy_hold.is_expired() and exchange.wait(job.wakeup, proxy_hold):
            early += job.take_events()
        if job.is_settled:
            check_done(job)
        return StreamReply(self._stream_events(exchange, job, parameters, early), ignored_headers(parameters))

    def _stream_events(
        self, exchange: Exchange, job: Job, parameters: Parameters, early: list[JobEvent]
    ) -> Generator[ServerEvent, None, None]:
        backstop = job_backstop(job)
        try:
            yield ServerEvent("", [b"accepted"])  # sends the head now and not with the first step
            pending, last_comment = early, b""
            silent_until = Deadline.after(KEEP_ALIVE_S)
            while True:
                events, settled = job.take_with_state()
                for event in pending + events:
                    _release_uploads(exchange, job)
                    if (sent := _server_event(event, job, parameters)) is not None:
                        yield sent
                        silent_until = Deadline.after(KEEP_ALIVE_S)
                    if isinstance(event, Partial | Result):
                        job.release_picture(event)  # it has been written, before the next event is produced
                pending = []
                if settled:
                    check_done(job)
                    return
                comment = self._waiting_comment(job)
                if comment and comment != last_comment:
                    last_comment = comment
                    yield ServerEvent("", [comment])
                    silent_until = Deadline.after(KEEP_ALIVE_S)
                pause = min(Deadline.after(WAITING_POLL_S), silent_until) if comment else silent_until
                if not exchange.wait(job.wakeup, min(pause, backstop)):
                    if backstop.is_expired():
                        raise overrun_error()
                    if silent_until.is_expired():
                        yield ServerEvent("", [b"waiting"])
                        silent_until = Deadline.after(KEEP_ALIVE_S)
        finally:
            self.end_job(exchange, job)
            job.close()

    def _waiting_comment(self, job: Job) -> bytes:
        """Return a comment on what a queued job waits for: its model, else the jobs before it. Empty if it runs."""
        if loading := self._load_comment(job):
            return loading
        place = self._dispatcher.place_of(job) if job.state is State.QUEUED else None
        return queue_comment(place) if place is not None else b""

    def _load_comment(self, job: Job) -> bytes:
        """Return a comment on the load that a queued job waits for, or an empty one if no load holds it up."""
        if job.state is not State.QUEUED:
            return b""
        try:
            status = self._dispatcher.status(job.model)
        except ModelNotFound:  # a reload has removed it
            return b""
        if status.state in ("ready", "failed"):
            return b""
        percent = "" if status.loading_percent is None else f" {status.loading_percent} %,"
        waited_s = time.monotonic() - job.timings.admitted_at
        state = f"{status.state}, {status.waits_for}" if status.waits_for else status.state
        return f"model {job.model} is {state}:{percent} {waited_s:.0f} s waited".encode()


def _release_uploads(exchange: Exchange, job: Job) -> None:
    """Release the uploads of a job that no worker needs any more, so that a slow reader does not keep them.

    From its preparation to its last picture, a job needs them only if its worker dies: they give way to other clients.
    """
    if not job.has_uploads:
        return
    if job.is_settled or job.has_all_pictures:
        job.give_up_uploads()
        exchange.release_form()
    elif job.prepared is not None:
        exchange.offer_form(job.give_up_uploads)


def client_of(exchange: Exchange) -> Client:
    """Return the party that a request's job counts for.

    A verified key identifies a client at any address; an unverified one only together with its network.
    """
    return Client(exchange.key) if exchange.is_verified else Client(exchange.network, exchange.key)


def job_backstop(job: Job) -> Deadline:
    """Return the deadline at which a handler gives up on a job that is still unsettled."""
    return Deadline(job.deadline.at + OVERRUN_S)


def overrun_error() -> DeadlineExceeded:
    """Return the error for a job that is unsettled at its backstop."""
    return DeadlineExceeded(f"The job did not end within {OVERRUN_S:g} s after its deadline.")


def _server_event(event: JobEvent, job: Job, parameters: Parameters) -> ServerEvent | None:
    """Return the server-sent event for a job's event, or None if there is none."""
    match event:
        case Progress():
            return progress_comment(event)
        case Partial() if job.prepared is not None:
            return partial_event(event, job.prepared, parameters)
        case Result() if job.prepared is not None:
            return completed_event(event, job.prepared, parameters)
        case _:
            return None


def _store_error(error: OSError) -> StoreFull | StoreUnusable:
    kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreUnusable
    return kind(
        f"The server cannot store the picture ({error.strerror}); retry later, or use response_format b64_json.",
        retry_after_s=10,
    )


def check_done(job: Job) -> Prepared:
    """Return the description of a done job's pictures; raise the error of a job that settled in another state."""
    if job.state is State.DONE and job.prepared is not None:
        return job.prepared
    if job.state is State.CANCELLED:
        raise job.error or ClientGone("the job was cancelled")
    error: ApiError = job.error or InternalError("The job ended without a result.")
    raise error
