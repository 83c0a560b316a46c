"""One exchange of a connection: its form, what it holds, how it ends, and its line in the log."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

from ovserve.accounts import Holding
from ovserve.api.record import CLIENT_GONE, End
from ovserve.deadline import Deadline
from ovserve.errors import ApiError, InternalError, LengthRequired, SpoolFull, UnsupportedMediaType
from ovserve.front.body import Body
from ovserve.front.forms.form import read_form
from ovserve.front.forms.spooled import SpooledForm
from ovserve.front.http1.head import Head
from ovserve.front.request import Request, escape_for_log, internal_error
from ovserve.front.transport import Transport
from ovserve.logs import fields
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore

__all__ = ["CLIENT_GONE", "HttpExchange", "log_access", "log_bug"]

# Of an unread body, so much is read and dropped to keep the connection; beyond it, the connection is closed.
MAX_DISCARD_BYTES = 64 * 1024
ENDED_RETRY_S = 2  # Retry-After of a request that gave way to another client

log = logging.getLogger(__name__)


class HttpExchange(Request):
    """One exchange of a connection; implements `api.exchange.Exchange`.

    Args:
        head: the request's head.
        address: the client's address.
        transport: the connection.
        spool: stores uploads.
        settings: the limits.
        end: ends this exchange with an error when it has to give way; called in any thread.
    """

    def __init__(
        self,
        head: Head,
        address: str,
        *,
        transport: Transport,
        spool: BlobStore,
        settings: Settings,
        end: Callable[[HttpExchange, ApiError], None],
    ) -> None:
        super().__init__(head, address, is_secure=transport.is_secure)
        self._transport = transport
        self._spool = spool
        self._settings = settings
        self._end = end
        self._form: SpooledForm | None = None
        self.body: Body | None = None
        self.status = 0  # of the response whose head has been written
        self.begun_at = time.perf_counter()  # with the head of the request
        self._body_s: tuple[float, float] | None = None  # from then to the begin and the end of reading the form
        self.headers_s: float | None = None  # from then to the head of the response
        self.error: ApiError | None = None  # sent to the client, as a response or as the last event of a stream
        self.keeps_connection = head.keep_alive
        self.is_rejected = False  # with an error after which the bytes that follow cannot be parsed reliably
        self.ended_by: ApiError | None = None  # why the exchange has to end early, to make room for another client
        self._holding: Holding | None = None
        self._is_counted = False  # for its named key
        self._on_release: Callable[[], None] | None = None  # the form was offered

    @property
    def holding(self) -> Holding:
        """What its segments count for. The first use is after the access check, which knows the client."""
        if self._holding is None:
            error = SpoolFull(
                "This request gave way: its client holds more than its share of the spool, and another one waits.",
                retry_after_s=ENDED_RETRY_S,
            )
            self._holding = self._spool.account.open(self.client, functools.partial(self._end, self, error))
        return self._holding

    def required_rate(self) -> float:
        """Return the bytes a second that the client has to transfer now because of what it holds; 0 for none."""
        return self._holding.required_rate() if self._holding is not None else 0.0

    def begin_for_key(self) -> None:
        """Count the request for its named key, until `close`. Raises RateLimited."""
        if self.grant is not None:
            self.grant.begin()
            self._is_counted = True

    def key_fields(self) -> dict[str, str]:
        """Return the fields of the response that say what is left of the key's limits."""
        return self.grant.fields() if self.grant is not None else {}

    def begin_response(self, status: int) -> None:
        """Note that the head of the response is about to be sent."""
        self.status, self.headers_s = status, time.perf_counter() - self.begun_at

    def end(self, sent: int) -> End:
        """Return how the exchange has ended, after `sent` bytes of a response."""
        has_failed_stream = self.status == 200 and self.error is not None
        return End(
            status=self.error.status if self.error is not None and has_failed_stream else self.status,
            received_bytes=self.body.received if self.body is not None else 0,
            sent_bytes=sent,
            body_s=self._body_s,
            headers_s=self.headers_s,
            total_s=time.perf_counter() - self.begun_at,
        )

    def check_ended(self) -> None:
        """Raise the error with which the exchange has to end early, if it has to."""
        if self.ended_by is not None:
            raise self.ended_by

    def read_form(self) -> SpooledForm:
        """Return the form, which lives until the exchange ends; the first call reads the body.

        Raises:
            ApiError: the body is malformed, over a limit, too slow, or of an unsupported type.
            ClientGone: the connection ended before the body did.
        """
        if self._form is None:
            coding = self.header("content-encoding")
            if coding and coding.lower() != "identity":
                raise UnsupportedMediaType(
                    f"Content-Encoding {coding[:40]!r} is not supported; send the body without a content coding",
                    headers={"Accept-Encoding": "identity"},
                )
            if self.head.content_length is None and not self.head.is_chunked:
                raise LengthRequired("the request has neither content-length nor transfer-encoding; send one of them")
            if self.body is None:
                raise ValueError("the exchange has ended")
            started = time.perf_counter()
            try:
                kind = self.header("content-type")
                self._form = read_form(self.body, kind, self._spool, self._settings, self.holding)
            finally:
                self._body_s = started - self.begun_at, time.perf_counter() - self.begun_at
        return self._form

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable, and return False at the deadline.

        Raises:
            ClientGone: the client closes, or has closed.
            ApiError: the exchange has to end early.
        """
        self.check_ended()
        return self._transport.wait(descriptor, deadline)

    def can_keep(self) -> bool:
        """Return whether the connection persists: the client allows it, and the unread body is short enough."""
        body = self.body
        if not self.keeps_connection or body is None or body.is_complete:
            return self.keeps_connection
        # A client that waits for 100 may or may not send the body (RFC 9110 section 10.1.1); a chunked body has no
        # known length.
        return (
            body.expected is not None
            and body.expected - body.received <= MAX_DISCARD_BYTES
            and not self.head.expects_continue
        )

    def release_form(self) -> None:
        """Release the spool segments of the form."""
        if self._form is not None:
            self._form.release()

    def offer_form(self, on_release: Callable[[], None]) -> None:
        """Let the form be released instead of ending the exchange; `on_release` is called before."""
        self._on_release = on_release

    def give_way(self, error: ApiError) -> bool:
        """Release the form if it was offered, else note the error to end with; return whether the exchange goes on.

        Runs in: the thread of another client.
        """
        on_release, self._on_release = self._on_release, None
        if on_release is None or self._form is None or self._holding is None:
            self.ended_by = self.ended_by or error
            return False
        self._holding.keep()  # before it gives back: that wakes the client that needs the room
        on_release()
        self._form.release()
        return True

    def close(self) -> None:
        """End the exchange: it no longer gives way to others, nor counts for its key."""
        self.release_form()
        if self._is_counted and self.grant is not None:
            self._is_counted = False
            self.grant.end()
        if self._holding is not None:
            self._holding.close()


def log_bug(exchange: HttpExchange, error: Exception) -> InternalError:
    """Log an unexpected exception with its traceback, and return the error for the client."""
    log.error("unexpected error", extra=fields(id=exchange.id), exc_info=error)
    return internal_error(exchange.id)


def log_access(exchange: HttpExchange, end: End) -> None:
    """Log one line for a request. The path stays percent-encoded, which makes it safe to log."""
    log_fields: dict[str, object] = {
        "bytes": end.sent_bytes,
        "ms": round(end.total_s * 1000, 1),
        "id": exchange.id,
        "address": exchange.address,
        **exchange.notes,
    }
    if exchange.record.state:
        log_fields["pictures"] = exchange.record.pictures
        log_fields |= {f"{stage}_ms": round(s * 1000, 1) for stage, s in exchange.record.stages.items()}
    if exchange.key:
        log_fields["key"] = exchange.key
    if exchange.grant is not None:
        log_fields["key_name"] = exchange.grant.name
    if exchange.client_request_id:
        log_fields["client_id"] = exchange.client_request_id
    if exchange.error is not None:
        log_fields["code"] = exchange.error.code
        if exchange.error.param:
            log_fields["param"] = escape_for_log(exchange.error.param)
        log_fields["why"] = escape_for_log(exchange.error.message)
    path = exchange.head.target.partition("?")[0]
    log.info("%s %s %d", exchange.method, path, exchange.status, extra=fields(**log_fields))
