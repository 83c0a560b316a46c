"""Reads the content of one request from its connection, within limits on size, rate and time."""

from __future__ import annotations

import time
from collections.abc import Callable

from ovserve.errors import ClientGone, ContentTooLarge, Draining, RequestTimeout
from ovserve.front.http1.chunks import ChunkDecoder
from ovserve.front.http1.head import Head
from ovserve.front.transport import Transport
from ovserve.settings.options import Settings

__all__ = ["Body"]

DRAIN_CHECK_S = 0.5  # longest single wait for the client, so that a drain that begins meanwhile is noticed
DRAINING_RETRY_S = 5  # the same as for a job that arrives while the server drains
SCRATCH_BYTES = 16 * 1024  # buffer for content that is received and dropped


class Body:
    """The content of one request. Thread-safe: no.

    Attributes:
        expected: total bytes according to Content-Length; None when the body is chunked.
        received: bytes of content returned so far.
    """

    def __init__(
        self,
        transport: Transport,
        head: Head,
        settings: Settings,
        before_wait: Callable[[], None] | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        *,
        required_rate: Callable[[], float] = lambda: 0.0,
        check_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to read; nothing is received yet.

        Args:
            transport: the connection.
            head: the head of the request, which says how the body is framed.
            settings: the limits on size and rate.
            before_wait: called once, before the first wait for the client: the place to send 100 (Continue).
            is_draining: whether the server drains; checked before each wait and every DRAIN_CHECK_S while it lasts.
            required_rate: the bytes a second that what the client holds requires now; a higher one than
                `min_body_bytes_per_s` replaces it.
            check_ended: raises the ApiError with which the request was ended; called like `is_draining`.
        """
        self._transport = transport
        self._grace_s = settings.body_grace_s
        self._rate = settings.min_body_bytes_per_s
        self._before_wait = before_wait
        self._is_draining = is_draining
        self._required_rate = required_rate
        self._check_ended = check_ended
        self._started = 0.0
        self._allowance_s = self._grace_s  # time that may still be spent waiting for the client
        self._credited_bytes = 0  # bytes that have already added to the allowance
        self._decoder = ChunkDecoder(settings) if head.is_chunked else None
        self.expected = None if head.is_chunked else head.content_length or 0
        self._remaining = self.expected or 0
        self.received = 0
        self._max_bytes = settings.max_body_bytes

    def check_size(self) -> None:
        """Check the announced size. Separate from the construction: a client without access gets that error first.

        Raises:
            ContentTooLarge: Content-Length is above `max_body_bytes`.
        """
        if self.expected is not None and self.expected > self._max_bytes:
            raise ContentTooLarge(f"the body is larger than {self._max_bytes} bytes")

    @property
    def is_complete(self) -> bool:
        """Whether the whole body, its framing included, has been received."""
        return not self._remaining if self._decoder is None else self._decoder.is_done

    def readinto(self, view: memoryview, /) -> int:
        """Receive content into `view` and return the number of bytes, 0 at the end of the body.

        Can return fewer bytes than fit: at the end of the body, and when the client pauses.

        Args:
            view: format B, not empty.

        Raises:
            MalformedRequest: the chunked framing is malformed.
            FieldsTooLarge: the trailer section is over a limit.
            ContentTooLarge: a chunk exceeds `max_body_bytes`.
            RequestTimeout: the client is slower than the minimum rate.
            Draining: the server began to drain before the body was complete.
            ClientGone: the connection ended before the body did.
        """
        if self._decoder is None:
            count = self._read_plain(view) if self._remaining else 0
        else:
            count = 0 if self._decoder.is_done else self._read_chunked(view, self._decoder)
        self.received += count
        return count

    def discard(self) -> None:
        """Receive and drop the rest of the body. Raises the same exceptions as `readinto`."""
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        while self.readinto(scratch):
            pass

    def _read_plain(self, view: memoryview) -> int:
        transport = self._transport
        if len(view) > self._remaining:
            view = view[: self._remaining]
        count = transport.take_into(view)
        if count < len(view):
            count += self._wait(transport.fill, view[count:] if count else view, count)
        self._remaining -= count
        return count

    def _read_chunked(self, view: memoryview, decoder: ChunkDecoder) -> int:
        transport = self._transport
        filled = 0
        while filled < len(view):
            if not transport.has_pending:
                want = min(decoder.remaining, len(view) - filled)
                if not want:
                    self._wait(self._receive_framing, view, filled)
                    continue
                # At the end of a chunk, receive the framing that follows in the same system call.
                free = view[filled : filled + want]
                count = self._wait(
                    transport.fill if want < decoder.remaining else transport.receive_beyond, free, filled
                )
            elif decoder.remaining:
                count = transport.take_into(view[filled : filled + decoder.remaining])
            else:
                data = transport.take_pending()
                transport.unread(data, decoder.feed(data, 0))
                if decoder.is_done:
                    break
                continue
            decoder.take(count)
            filled += count
            if filled == len(view):
                break
        return filled

    def _receive_framing(self, _: memoryview, timeout_s: float) -> int:
        data = self._transport.receive(timeout_s)
        self._transport.unread(data, 0)
        return len(data)

    def _wait(self, receive: Callable[[memoryview, float], int], view: memoryview, uncounted: int) -> int:
        """Call `receive` within the time that the minimum rate leaves the client, and return its byte count.

        A token bucket of seconds: each byte adds 1 / min_body_bytes_per_s, waiting spends it, and it never holds more
        than body_grace_s, so that a client that was fast at first cannot stay silent for hours. Without a minimum rate,
        each byte refills it.

        Args:
            receive: receives into a view within a timeout in seconds.
            view: where to receive.
            uncounted: bytes received in this `readinto` call, which `received` does not include yet.

        Raises:
            RequestTimeout: the allowance is used up.
            Draining: the server drains.
            ClientGone: the connection ended.
        """
        self._check_draining()
        if not self._started:
            self._started = time.monotonic()
            if self._before_wait:
                self._before_wait()
        fresh = self.received + uncounted - self._credited_bytes
        self._credited_bytes += fresh
        if rate := max(self._rate, self._required_rate()):
            self._allowance_s = min(self._grace_s, self._allowance_s + fresh / rate)
        else:
            self._allowance_s = self._grace_s
        count = 0
        while not count:
            since, limit_s = time.monotonic(), min(self._allowance_s, DRAIN_CHECK_S)
            try:
                count = receive(view, limit_s)
            except TimeoutError:
                self._check_draining()
                if limit_s < DRAIN_CHECK_S:
                    raise RequestTimeout(
                        f"the body arrived too slowly: {self._credited_bytes} bytes in"
                        f" {time.monotonic() - self._started:.0f} s"
                    ) from None
            else:
                if not count:
                    raise ClientGone("the client closed the connection in the middle of the body")
            finally:
                self._allowance_s -= time.monotonic() - since
        return count

    def _check_draining(self) -> None:
        """Raise Draining while the server drains: once the upload is complete, its job would be rejected anyway.

        Raises the error of a request that was ended, too.
        """
        self._check_ended()
        if self._is_draining():
            raise Draining("The server is shutting down and accepts no new jobs.", retry_after_s=DRAINING_RETRY_S)
