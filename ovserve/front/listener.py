"""The listening socket: accepts connections, gives each a thread of a bounded number, and ends them in order.

When every place is taken, the connection that has been idle longest makes way for a new one.

Threads: one accepts, one (`overflow`) answers whoever finds no place, one serves each connection. Accepting never waits for any
of them, nor for descriptors: when those run out, one kept in reserve is spent on closing the connection properly.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import socketserver
import threading
import time
from http.server import ThreadingHTTPServer

from ovserve.api.exchange import Api
from ovserve.errors import StartupError
from ovserve.front.handler import Connection
from ovserve.front.http1.response import Responses
from ovserve.front.keys import read_keys
from ovserve.front.overflow import Overflow
from ovserve.front.turns import Turns
from ovserve.logs import fields
from ovserve.settings.options import Settings
from ovserve.wire.local.spool import Spool

__all__ = ["Listener"]

CUT_TIMEOUT_S = 5.0  # for threads whose connections were cut; all their waits end with the connection
IDLE_ENOUGH_S = 1.0  # before a connection makes place: whoever has just been answered may be about to ask again
# A peer whose machine is gone without a word is found after two minutes, whatever its thread waits for.
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}  # seconds, seconds, probes
EXHAUSTED_PAUSE_S = 0.05  # before accepting is tried again when even the reserve did not help
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class Listener(ThreadingHTTPServer):
    """The HTTP server. Thread-safe: the properties and `stop`.

    Attributes:
        settings, api, spool, responses, turns: what its connections work with.
        keys: who may ask; replaced as a whole by a reload.
        host, port: where it listens, the port that was taken when any free one was asked for.
        is_draining: connections end with their exchange.
    """

    daemon_threads = True  # the interpreter never waits for a thread; `stop` does, with a limit
    block_on_close = False

    def __init__(self, settings: Settings, api: Api, spool: Spool) -> None:
        """Take the port. Raises StartupError when that is not possible, or the API keys cannot be read."""
        self.settings = settings
        self.api = api
        self.spool = spool
        self.responses = Responses(settings)
        self.keys = read_keys(settings)
        self.turns = Turns()
        self.is_draining = False
        self.request_queue_size = settings.backlog
        self.host: str = settings.host.removeprefix("[").removesuffix("]")  # an IPv6 address may be written as in a URL
        self.address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            super().__init__((self.host, settings.port), socketserver.BaseRequestHandler)
        except (OSError, TypeError) as error:  # TypeError: a host that cannot be encoded as a name (IDNA)
            why = getattr(error, "strerror", None) or str(error)
            raise StartupError(f"cannot listen on {settings.host} port {settings.port}: {why}") from None
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]
        self._overflow = Overflow(self)
        self._connections: dict[Connection, threading.Thread] = {}
        self._leaving: set[Connection] = set()  # of them, those told to make place: their threads are about to end
        self._ended = threading.Condition()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reserve = -1
        self._take_reserve()
        self._thread = threading.Thread(target=self.serve_forever, name="accept", daemon=True)
        self._is_stopping = False
        self._is_stopped = False

    def server_bind(self) -> None:
        """Bind; without looking up the host's full name, which can take as long as a name server likes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit these
        for option, value in KEEPALIVE.items():
            self.socket.setsockopt(socket.IPPROTO_TCP, option, value)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def start(self) -> None:
        """Start to accept."""
        self._overflow.start()
        self._thread.start()
        log.info("listening", extra=fields(address=self.host, port=self.port, api_keys=len(self.keys)))

    @property
    def active_exchanges(self) -> int:
        """Requests whose answers are not written yet."""
        with self._ended:
            return sum(connection.in_flight for connection in self._connections)

    @property
    def open_connections(self) -> int:
        """Connections that have a thread."""
        with self._ended:
            return len(self._connections)

    # --- accepting ------------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.0) -> None:  # noqa: ARG002 - nothing is polled for
        """Accept until `shutdown`. Runs in: the accept thread."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.register(self._wakeup, select.POLLIN)
        while not self._is_stopping:
            poller.poll()
            if self._reserve < 0:
                self._take_reserve()
            if not self._accept_all():
                self._make_room(poller)

    def shutdown(self) -> None:
        """Stop accepting and wait for the accept thread. Thread-safe: yes."""
        self._is_stopping = True
        os.eventfd_write(self._wakeup, 1)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _accept_all(self) -> bool:
        """Accept whatever waits; False when the process has run out of something."""
        try:
            while not self._is_stopping and self._accept_one():
                pass
        except OSError:
            return False
        return True

    def _accept_rest(self) -> None:
        """Take what the kernel holds for us: closing the socket would reset it. No more than that, however many still come."""
        with contextlib.suppress(OSError):
            for _ in range(self.request_queue_size + 1):  # listen(2) on Linux: one more than asked for
                if not self._accept_one():
                    return

    def _accept_one(self) -> bool:
        """Accept a connection and find it a place; False when none waits. Raises OSError when the process has run out of something."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            return True  # that one client has gone again: accept(2) tells so with many numbers
        try:
            self.process_request(connection, address)
        except Exception:
            log.exception("a connection could not be served")
            connection.close()
        return True

    def _make_room(self, poller: select.poll) -> None:
        """No descriptor is left: spend the reserve on closing the next connection, rather than let it wait for ever."""
        log.warning("out of descriptors: a connection is closed unanswered")
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
        with contextlib.suppress(OSError):
            connection, _ = self.socket.accept()
            connection.close()
        if not self._take_reserve():
            poller.unregister(self.socket)
            poller.poll(EXHAUSTED_PAUSE_S * 1000)
            poller.register(self.socket, select.POLLIN)

    def _take_reserve(self) -> bool:
        """Keep a descriptor for the day when there is none left; False on that day."""
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        return True

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        """Give the connection a thread, or let the overflow answer it. Runs in: the accept thread."""
        address = client_address[0]
        if not (self._has_place() or self._end_idlest()):
            self._overflow.offer(request, address)
            return
        try:
            connection = Connection(request, address, self)
        except OSError:
            request.close()  # it has gone again
            return
        thread = threading.Thread(target=self._serve, args=(connection, request), name="connection", daemon=True)
        with self._ended:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError:  # the machine has no thread left
            self._forget(connection)
            self._overflow.offer(request, address)

    def _has_place(self) -> bool:
        return len(self._connections) - len(self._leaving) < self.settings.max_connections

    def _end_idlest(self) -> bool:
        """Have the connection that has been idle longest make place (RFC 9112 section 9.5); False when none is idle long enough."""
        with self._ended:
            if len(self._leaving) >= self.settings.overflow_connections:
                return False  # they are places beyond the limit until their threads have ended
            # Each `idle_since` is read once: its thread may be going back to work.
            known = {connection.idle_since: connection for connection in self._connections.keys() - self._leaving}
            for since in sorted(filter(None, known)):
                if time.monotonic() - since < IDLE_ENOUGH_S:
                    return False
                if known[since].close_idle(since):
                    self._leaving.add(known[since])
                    return True
        return False

    def _serve(self, connection: Connection, request: socket.socket) -> None:
        """Runs in: the connection's thread."""
        try:
            connection.serve()
        except Exception:
            log.exception("a connection ended by a bug")
        finally:
            request.close()
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        with self._ended:
            self._connections.pop(connection, None)
            self._leaving.discard(connection)
            self._ended.notify_all()

    # --- ending ---------------------------------------------------------------------------------------------------------

    def stop(self, grace_s: float) -> None:
        """Stop accepting, close idle connections, wait for the others at most `grace_s`, then cut the rest.

        Whoever has just connected is about to ask, and is waited for like an exchange in flight.

        Afterwards none of its threads is left, other than those stuck in something that is not a wait. Safe to call twice.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        self.is_draining = True
        self.shutdown()
        self._accept_rest()
        self._overflow.stop()
        self.server_close()
        with self._ended:
            threads = list(self._connections.values())
            for connection in self._connections:
                connection.close_idle(connection.idle_since)
            self._ended.wait_for(lambda: not self._connections, grace_s)
            if cut := sum(connection.in_flight for connection in self._connections):
                log.warning("answers cut off", extra=fields(number=cut, grace_s=grace_s))
            for connection in self._connections:
                connection.cut()
        end = time.monotonic() + CUT_TIMEOUT_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        os.close(self._wakeup)
        if self._reserve >= 0:
            os.close(self._reserve)
