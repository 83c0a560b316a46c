"""One request for pictures from form to reply: validate, admit, wait, answer."""

from __future__ import annotations

from collections.abc import Generator

from ovserve.api.exchange import Exchange, JsonReply, Reply, ServerEvent, StreamReply
from ovserve.api.parameters.params import Parameters, parse_parameters
from ovserve.api.parameters.values import check_range
from ovserve.api.replies import completed_event, images_reply, partial_event, progress_comment
from ovserve.api.store import Store
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, JobEvent, Partial, Result, State
from ovserve.errors import ApiError, ClientGone, DeadlineExceeded, Draining, InternalError, InvalidValue, SpoolFull
from ovserve.metrics import Metrics
from ovserve.models.catalog import Catalog
from ovserve.settings.options import Settings
from ovserve.wire.messages import Prepared, Progress

__all__ = ["Images"]

STREAM_HEAD_WAIT_S = 10.0  # a stream's headers go out when the job is prepared, or after this; later errors are events
KEEP_ALIVE_S = 15.0  # silence on a stream before a comment line; a client's own limit is 300
DRAINING_RETRY_S = 5  # by then another instance, or the next one here, answers
OVERRUN_S = 30.0  # how long after its deadline a job may stay unsettled before the handler gives up on the dispatcher


class Images:
    """The way of one request. Runs in: handler threads; thread-safe, for it holds nothing of any request."""

    def __init__(
        self, settings: Settings, catalog: Catalog, dispatcher: Dispatcher, store: Store, metrics: Metrics
    ) -> None:
        self.settings = settings  # both are replaced as a whole by a reload
        self.catalog = catalog
        self._dispatcher = dispatcher
        self._store = store
        self._metrics = metrics

    def make(self, exchange: Exchange, endpoint: str, path_model: str | None) -> Reply:
        """Serve one edit, generation or variation. Raises ApiError and ClientGone."""
        if (
            self._dispatcher.is_draining
        ):  # before the body is read: a client that waits for 100-continue hears it at once
            raise Draining("The server is going down and takes no new jobs.", retry_after_s=DRAINING_RETRY_S)
        form = exchange.read_form()  # may take minutes: what it is checked by is looked up behind it
        parameters = parse_parameters(form, endpoint, path_model, self.catalog, self.settings)
        if parameters.response_format == "url" and not self._base(exchange):
            raise InvalidValue(
                "'response_format' = 'url' needs a Host field, or the server a public_url: the address is made from it.",
                param="response_format",
            )
        job = Job(
            id=exchange.id,
            model=parameters.model.name,
            # A known key is somebody, wherever it comes from; any other is one of many that its address may send.
            client=Client(exchange.key) if exchange.is_verified else Client(exchange.network, exchange.key),
            request=parameters.request,
            deadline=Deadline.after(self._timeout_s(exchange, parameters)),
        )
        try:
            self._dispatcher.admit(job)
        except BaseException:
            job.close()
            raise
        handed_over = False
        try:
            if parameters.stream:
                reply: Reply = self._stream_reply(exchange, job, parameters)
                handed_over = True
            else:
                reply = self._whole_reply(exchange, job, parameters)
            return reply
        finally:
            if not handed_over:
                self._end(job)

    def _timeout_s(self, exchange: Exchange, parameters: Parameters) -> float:
        asked = exchange.header("x-timeout-s")
        if asked is None:
            return parameters.timeout_s
        try:
            timeout_s = float(asked)
        except ValueError:
            timeout_s = 0.0
        if not timeout_s > 0:
            raise InvalidValue(
                f"Invalid value for 'x-timeout-s': expected seconds above 0, but got '{asked[:40]}'.",
                param="x-timeout-s",
            )
        check_range("x-timeout-s", timeout_s, None, self.settings.max_timeout_s)
        return timeout_s

    def _end(self, job: Job) -> None:
        """End the exchange: a job that nobody waits for any more is cancelled, and its segments go."""
        if not job.is_settled:
            self._dispatcher.cancel(job)
        self._count(job)
        job.close()

    def _count(self, job: Job) -> None:
        self._metrics.jobs.labels(job.model, job.state.value).inc()
        if job.state is State.DONE:
            timings = job.timings
            self._metrics.pictures.labels(job.model).inc(len(job.results))
            stages = {
                "queue": timings.dispatched_at - timings.admitted_at,
                "prepare": timings.prepare_ms / 1000,
                "denoise": timings.denoise_ms / 1000,
                "finish": timings.finish_ms / 1000,
            }
            for stage, seconds in stages.items():
                self._metrics.stages.labels(job.model, stage).observe(max(0.0, seconds))

    # --- a reply in one piece ---------------------------------------------------------------------------------------

    def _whole_reply(self, exchange: Exchange, job: Job, parameters: Parameters) -> JsonReply:
        backstop = Deadline(job.deadline.at + OVERRUN_S)
        while not job.is_settled:
            if not exchange.wait(job.wakeup, backstop):
                raise DeadlineExceeded("The job did not end at its deadline.")
            job.take_events()
        prepared = _finished(job)
        urls = self._keep(exchange, job, parameters) if parameters.response_format == "url" else None
        return images_reply(job, prepared, parameters, urls)

    def _base(self, exchange: Exchange) -> str:
        """What addresses of pictures begin with; empty where nothing says how the client reaches the server."""
        host = exchange.header("host")
        return self.settings.public_url.rstrip("/") or (f"http://{host}" if host else "")

    def _keep(self, exchange: Exchange, job: Job, parameters: Parameters) -> dict[int, str]:
        """Keep every picture of a job; the address of each."""
        base = self._base(exchange)
        urls = {}
        for number, result in job.results.items():
            with result.segment.view[: result.size] as picture:
                try:
                    name = self._store.keep(picture, parameters.request.output_format)
                except OSError as error:
                    raise SpoolFull(f"The picture cannot be kept: {error.strerror}.", retry_after_s=10) from None
            urls[number] = f"{base}/v1/images/files/{name}"
        return urls

    # --- a stream ---------------------------------------------------------------------------------------------------

    def _stream_reply(self, exchange: Exchange, job: Job, parameters: Parameters) -> StreamReply:
        """Wait until nothing that is the client's fault can go wrong any more, then hand the stream over."""
        head_deadline = Deadline.after(STREAM_HEAD_WAIT_S)
        early: list[JobEvent] = []
        while job.prepared is None and not job.is_settled:
            if not exchange.wait(job.wakeup, head_deadline):
                break
            early += job.take_events()
        if job.is_settled:
            _finished(job)
        return StreamReply(self._events(exchange, job, parameters, early))

    def _events(
        self, exchange: Exchange, job: Job, parameters: Parameters, early: list[JobEvent]
    ) -> Generator[ServerEvent, None, None]:
        backstop = Deadline(job.deadline.at + OVERRUN_S)
        try:
            yield ServerEvent("", b"accepted")  # the head goes out with it, not with the first step
            pending = early
            while True:
                settled = job.is_settled  # read before the events: what was posted first is then among them
                for event in pending + job.take_events():
                    yield from _told(event, job, parameters)
                pending = []
                if settled:
                    _finished(job)
                    return
                if not exchange.wait(job.wakeup, min(Deadline.after(KEEP_ALIVE_S), backstop)):
                    if backstop.is_expired():
                        raise DeadlineExceeded("The job did not end at its deadline.")
                    yield ServerEvent("", b"waiting")
        finally:
            self._end(job)


def _told(event: JobEvent, job: Job, parameters: Parameters) -> Generator[ServerEvent, None, None]:
    match event:
        case Progress():
            yield progress_comment(event)
        case Partial() if job.prepared is not None:
            yield partial_event(event, job.prepared, parameters)
        case Result() if job.prepared is not None:
            yield completed_event(event, job.prepared, parameters)
        case _:
            pass


def _finished(job: Job) -> Prepared:
    """What a settled job's pictures are. Raises what it failed with."""
    if job.state is State.DONE and job.prepared is not None:
        return job.prepared
    if job.state is State.CANCELLED:
        raise job.error or ClientGone("the job was cancelled")
    error: ApiError = job.error or InternalError("The job ended without a result.")
    raise error
