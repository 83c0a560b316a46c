"""Request content off the socket: Content-Length or chunked, within its size, its least rate, its deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable

from ovserve.errors import ClientGone, ContentTooLarge, Draining, RequestTimeout
from ovserve.front.http1.chunks import ChunkDecoder
from ovserve.front.http1.head import Head
from ovserve.front.transport import Transport
from ovserve.settings.options import Settings

__all__ = ["Body"]

LOOK_UP_S = 0.5  # how long a wait lasts before the server may have begun to go down
DRAINING_RETRY_S = 5  # as for a job that comes too late
SCRATCH_BYTES = 16 * 1024  # at a time, for content that nobody wants


class Body:
    """The content of one request. Thread-safe: no.

    Attributes:
        expected: bytes in all by Content-Length; None when the body is chunked.
        received: bytes handed out so far.
    """

    def __init__(
        self,
        transport: Transport,
        head: Head,
        settings: Settings,
        before_wait: Callable[[], None] | None = None,
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        """`before_wait` is called once, before the first wait for the client: the place for 100 (Continue).

        `is_draining` is asked before each wait and while it lasts.

        Raises ContentTooLarge when the head announces more than the largest body.
        """
        self._transport = transport
        self._grace_s = settings.body_grace_s
        self._rate = settings.min_body_bytes_per_s
        self._before_wait = before_wait
        self._is_draining = is_draining
        self._started = 0.0
        self._patience_s = self._grace_s
        self._credited = 0  # bytes that have bought patience
        self._decoder = ChunkDecoder(settings) if head.is_chunked else None
        self.expected = None if head.is_chunked else head.content_length or 0
        self._remaining = self.expected or 0
        self.received = 0
        if self._remaining > settings.max_body_bytes:
            raise ContentTooLarge(f"the body is larger than {settings.max_body_bytes} bytes")

    @property
    def is_complete(self) -> bool:
        """Whether all of it, its framing included, has been received."""
        return not self._remaining if self._decoder is None else self._decoder.is_done

    def readinto(self, view: memoryview, /) -> int:
        """Receive content into `view` (format B, not empty), as much as fits; the number of bytes, 0 at the end.

        Fewer bytes than fit come back when the least rate is about to be broken, and at the end.

        Raises:
            MalformedRequest, FieldsTooLarge: the chunked framing is wrong, or its trailer section over a limit.
            ContentTooLarge: a chunk goes beyond the largest body.
            RequestTimeout: the client is slower than the least rate.
            Draining: the server goes down before all of it has come.
            ClientGone: the connection ended before the body did.
        """
        if self._decoder is None:
            count = self._read_plain(view) if self._remaining else 0
        else:
            count = 0 if self._decoder.is_done else self._read_chunked(view, self._decoder)
        self.received += count
        return count

    def discard(self) -> None:
        """Receive the rest and drop it. Raises what `readinto` raises."""
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
                # Up to the end of the chunk: what follows is framing, and comes in the same call.
                free = view[filled : filled + want]
                count = self._wait(
                    transport.fill if want < decoder.remaining else transport.receive_beyond, free, filled
                )
            elif decoder.remaining:
                count = transport.take_into(view[filled : filled + decoder.remaining])
            else:
                data = transport.take_pending()
                transport.put_back(data, decoder.feed(data, 0))
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
        self._transport.put_back(data, 0)
        return len(data)

    def _wait(self, receive: Callable[[memoryview, float], int], view: memoryview, fresh: int) -> int:
        """Call `receive` with the patience that is left; `fresh`: bytes received and not yet in `received`.

        Each byte buys the time that the least rate gives it, waiting spends it, and nobody saves up more than the grace: a client
        that was quick may not fall silent for hours. Where no rate is asked for, each byte buys all of the grace.
        """
        self._check_draining()
        if not self._started:
            self._started = time.monotonic()
            if self._before_wait:
                self._before_wait()
        bought = self.received + fresh - self._credited
        self._credited += bought
        if self._rate:
            self._patience_s = min(self._grace_s, self._patience_s + bought / self._rate)
        else:
            self._patience_s = self._grace_s
        count = 0
        while not count:
            since, limit_s = time.monotonic(), min(self._patience_s, LOOK_UP_S)
            try:
                count = receive(view, limit_s)
            except TimeoutError:
                self._check_draining()
                if limit_s < LOOK_UP_S:
                    raise RequestTimeout(
                        f"the body came too slowly: {self._credited} bytes in {time.monotonic() - self._started:.0f} s"
                    ) from None
            else:
                if not count:
                    raise ClientGone("closed in the middle of the body")
            finally:
                self._patience_s -= time.monotonic() - since
        return count

    def _check_draining(self) -> None:
        """Whoever still sends when the server goes down could only be refused afterwards. Raises Draining."""
        if self._is_draining():
            raise Draining("The server is going down and takes no new jobs.", retry_after_s=DRAINING_RETRY_S)
