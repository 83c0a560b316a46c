"""Listening socket: accepts connections, starts a thread for each up to a limit, and stops gracefully.

At the limit, a new connection makes one give way: a quiet one, which waits for a request, else one of a client above
its share (`ovserve.accounts`).

Threads: one accepts, one (`overflow`) answers connections beyond the limit, one (`linger`) keeps refused connections
open until their clients have read the answer, and one serves each connection. Accepting never waits for the others, nor
for file descriptors: when those run out, a spare one is closed so that the next connection can be accepted and closed.
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
from dataclasses import replace
from http.server import ThreadingHTTPServer
from typing import Any

from ovserve.accounts import Account, Holding
from ovserve.api.exchange import Api
from ovserve.errors import StartupError, may_pass
from ovserve.front.access import Access, RefusedOrigins
from ovserve.front.handler import Connection
from ovserve.front.http1.forwarded import TrustedProxies
from ovserve.front.http1.origins import OriginRule, is_loopback_host
from ovserve.front.http1.response import Responses
from ovserve.front.keys import Keys, read_admin_keys, read_keys
from ovserve.front.linger import Linger
from ovserve.front.overflow import Overflow, too_many_connections
from ovserve.front.request import network_of
from ovserve.front.run_token import RunToken
from ovserve.front.tls import Certificates, read_certificates
from ovserve.front.unixsocket import bind_unix, owner_of
from ovserve.logs import LogLimit, fields
from ovserve.settings.access import UNIX_PEER, ListenAddress, parse_listen
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore

__all__ = ["Listener", "ListenerGroup"]

ABORT_TIMEOUT_S = 5.0  # for the threads of aborted connections to end; all their waits end with the connection
LINGER_STOP_S = 1.0  # at least, for clients that are still sending when the listener stops
# Before a quiet connection may be evicted: a client that has just connected, or been answered, may send a request.
MIN_QUIET_S = 1.0
# A peer whose machine has vanished is detected after two minutes, whatever its thread waits for.
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}  # seconds, seconds, probes
EXHAUSTED_PAUSE_S = 0.05  # before the next attempt to accept when no spare descriptor could be opened
PRIVATE_MODE = 0o600  # of the admin listener's Unix socket: who may open it needs no key
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class Listener(ThreadingHTTPServer):
    """The HTTP server. Thread-safe: the properties and `stop`.

    Attributes:
        settings, api, spool, responses, run_token, proxies: shared by its connections (`ConnectionContext`).
        access: the rules and keys; `configure` replaces the object.
        certificates: the certificate for TLS; None: connections without TLS.
        linger: takes over connections whose client may still send after the answer.
        rejections: limits the log lines of connections that send no valid request, or find none free.
        where: where it listens, as configured.
        host, port: where it listens; the actual port when the configured one is 0. Of a Unix socket: its path, and 0.
        is_admin: whether this is the admin listener.
        closes_connections: responses close their connections; new ones are still accepted.
        is_draining: connections end after their current exchange, and uploads in progress are rejected.
    """

    daemon_threads = True  # the interpreter waits for no thread at exit; `stop` does, with a limit
    block_on_close = False

    def __init__(
        self,
        settings: Settings,
        api: Api[Any],
        spool: BlobStore,
        admin: ListenAddress | None = None,
        *,
        address: ListenAddress | None = None,
        group: ListenerGroup | None = None,
        inherited: socket.socket | None = None,
    ) -> None:
        """Bind the address and listen.

        Args:
            settings: the limits; and the address (`host`, `port`) if no other is given.
            api: answers requests.
            spool: stores uploads.
            admin: the address of the admin listener; None: this is not one.
            address: the address of another listener than the admin listener.
            group: the listeners that share the limit of connections; None: this one has its own.
            inherited: a socket that listens on the address already, from the service manager.

        Raises:
            StartupError: the address cannot be bound.
            SettingsError: the keys or the certificate cannot be read.
        """
        self.settings = settings
        self.api = api
        self.spool = spool
        self.responses = Responses(settings)
        # Operators' tools connect to the admin listener directly.
        self.proxies = TrustedProxies(settings if admin is None else replace(settings, proxy_protocol=False))
        self.rejections = LogLimit("rejected connections")
        self._exhaustion = LogLimit("out of file descriptors")
        self._origins, self._refused_origins = OriginRule(settings), RefusedOrigins()
        self.run_token = RunToken()
        self.closes_connections = False
        self.is_draining = False
        self.request_queue_size = settings.backlog
        self.is_admin = admin is not None
        # An IPv6 address may be written as in a URL.
        main = ListenAddress(settings.host.removeprefix("[").removesuffix("]"), settings.port)
        self.where = admin or address or main
        self.host: str = self.where.path or self.where.host
        self._is_socket = bool(self.where.path)
        self._socket_file: os.stat_result | None = None  # the file of a Unix socket, while it is bound
        self.address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        target: Any = (self.host, self.where.port)
        if self._is_socket:
            self.address_family, target = socket.AF_UNIX, self.host
        try:
            super().__init__(target, socketserver.BaseRequestHandler, bind_and_activate=inherited is None)
            if inherited is not None:
                self.socket.close()
                self.socket = inherited
        except (OSError, TypeError) as error:  # TypeError: a host that cannot be encoded as a name (IDNA)
            why = getattr(error, "strerror", None) or str(error)
            shown = self.host if self._is_socket else f"{target[0]} port {target[1]}"
            is_transient = isinstance(error, OSError) and may_pass(error)
            raise StartupError(f"cannot listen on {shown}: {why}", is_transient=is_transient) from None
        self.port: int = 0 if self._is_socket else self.socket.getsockname()[1]
        try:
            self.configure(settings, read_keys(settings), read_admin_keys(settings), read_certificates(settings))
        except BaseException:
            self.server_close()
            raise
        self.socket.setblocking(False)
        self.linger = Linger(settings)
        self._overflow = Overflow(self)
        self._group = group or ListenerGroup(settings)
        self._group.listeners.append(self)
        self._places = self._group.places
        self._connections: dict[Connection, threading.Thread] = {}
        self._evicted: set[Connection] = set()  # subset of `_connections`: their threads are about to end
        self._changed = threading.Condition()  # guards both; notified when a connection is removed
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._spare_fd = -1
        self._open_spare_fd()
        self._thread = threading.Thread(target=self.serve_forever, name="accept", daemon=True)
        self._is_stopping = False
        self._is_stopped = False

    def server_bind(self) -> None:
        """Bind without the standard library's lookup of the host's full name, which can wait for a name server."""
        if self._is_socket:
            mode, owner = PRIVATE_MODE, (-1, -1)
            if not self.is_admin:
                mode, owner = int(self.settings.socket_mode, 8), owner_of(self.settings)
            bind_unix(self.socket, self.host, mode, owner)
            self._socket_file = os.lstat(self.host)
            return
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit these
        for option, value in KEEPALIVE.items():
            self.socket.setsockopt(socket.IPPROTO_TCP, option, value)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def server_close(self) -> None:
        """Close the listening socket, and remove a Unix socket's file."""
        super().server_close()
        if self._socket_file is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self.host), self._socket_file):
                    os.unlink(self.host)
            self._socket_file = None

    def configure(
        self, settings: Settings, keys: Keys, admin_keys: Keys, certificates: Certificates | None = None
    ) -> None:
        """Replace the keys, the rules that depend on them and the certificate, for all requests from now on.

        Thread-safe: yes.

        Args:
            settings: where else the server listens, and the rules.
            keys: the API keys.
            admin_keys: the admin keys.
            certificates: the certificate; a listener whose address has another scheme than https serves without it.
        """
        own = "" if self._is_socket else self.socket.getsockname()[0]
        others = [] if self.is_admin else [*map(parse_listen, settings.listen), parse_listen(settings.admin_listen)]
        is_local = is_loopback_host(own) and all(
            bool(other.path) or is_loopback_host(other.host) for other in others if other is not None
        )
        is_plain = self._is_socket or self.where.scheme == "http"
        self.certificates = None if is_plain else certificates
        self.access = Access(
            settings,
            keys,
            admin_keys,
            origins=self._origins,
            refused=self._refused_origins,
            is_local=is_local,
            is_admin=self.is_admin,
            is_socket=self._is_socket,
        )

    def start(self) -> None:
        """Start to accept connections."""
        self.linger.start()
        self._overflow.start()
        self._thread.start()
        log.info(
            "listening for operators" if self.is_admin else "listening",
            extra=fields(
                address=self.host, port=self.port, tls=self.certificates is not None, api_keys=len(self.access.keys)
            ),
        )

    @property
    def url(self) -> str:
        """Where it listens: the base of its URLs, or `unix:` and the path of the socket."""
        if self._is_socket:
            return f"unix:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificates else 'http'}://{host}:{self.port}"

    @property
    def active_exchanges(self) -> int:
        """How many requests are being answered."""
        with self._changed:
            return sum(connection.in_flight for connection in self._connections)

    @property
    def open_connections(self) -> int:
        """How many connections have a thread."""
        with self._changed:
            return len(self._connections)

    # --- accepting ----------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.0) -> None:  # noqa: ARG002 - argument of the base class
        """Accept until `shutdown`. Runs in: the accept thread."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.register(self._wakeup, select.POLLIN)
        while not self._is_stopping:
            poller.poll()
            if self._spare_fd < 0:
                self._open_spare_fd()
            if not self._accept_all():
                self._close_next(poller)

    def shutdown(self) -> None:
        """Stop accepting and wait for the accept thread. Thread-safe: yes."""
        self._is_stopping = True
        os.eventfd_write(self._wakeup, 1)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _accept_all(self) -> bool:
        """Accept all waiting connections; return False when descriptors or memory have run out."""
        try:
            while not self._is_stopping and self._accept_one():
                pass
        except OSError:
            return False
        return True

    def _accept_backlog(self) -> None:
        """Accept the connections in the backlog, which closing the socket would reset.

        Their number is limited to the length of the backlog, because new ones may keep arriving.
        """
        with contextlib.suppress(OSError):
            for _ in range(self.request_queue_size + 1):  # Linux queues one more than the backlog given to listen(2)
                if not self._accept_one():
                    return

    def _accept_one(self) -> bool:
        """Accept one connection; return False when none waits. Raises OSError without free descriptors or memory."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            return True  # the peer of this connection has gone; accept(2) reports that with many error numbers
        try:
            self.process_request(connection, address)
        except Exception:
            log.exception("cannot serve a connection; it is closed")
            connection.close()
        return True

    def _close_next(self, poller: select.poll) -> None:
        """Accept and close the next connection with the spare descriptor, so that it does not wait for ever."""
        self._exhaustion.log(log, logging.WARNING, "out of file descriptors; a connection is closed without an answer")
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1
        with contextlib.suppress(OSError):
            connection, _ = self.socket.accept()
            connection.close()
        if not self._open_spare_fd():
            poller.unregister(self.socket)
            poller.poll(EXHAUSTED_PAUSE_S * 1000)
            poller.register(self.socket, select.POLLIN)

    def _open_spare_fd(self) -> bool:
        """Open a spare descriptor to close on EMFILE; return False when none is available."""
        try:
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        return True

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        """Start a thread for the connection, or hand it to the overflow thread. Runs in: the accept thread."""
        address = UNIX_PEER if self._is_socket else client_address[0]
        place = self._places.open(network_of(address))
        if not self._take(place):
            self._overflow.offer(request, address)
            return
        try:
            connection = self._open(request, address, place)
        except OSError:
            place.give(1)
            request.close()  # the peer has gone already
            return
        thread = threading.Thread(target=self._serve, args=(connection, request), name="connection", daemon=True)
        with self._changed:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError:  # no more threads can be started
            self._remove(connection)
            self._overflow.offer(request, address)

    def _open(self, request: socket.socket, address: str, place: Holding) -> Connection:
        """Return a connection that holds a place. Raises OSError if the peer has gone."""
        connection = Connection(request, address, self, place)
        place.on_end(lambda: self._end(connection))
        return connection

    def _take(self, place: Holding) -> bool:
        """Take a place for a new connection; return False if there is none, and no other connection gives way."""
        if place.take(1, may_end=False):
            return True
        if sum(len(listener._evicted) for listener in self._group.listeners) >= self.settings.overflow_connections:
            return False  # until their threads have ended, evicted connections exceed the limit
        if self._evict_quiet(place.client):
            return place.take(1, may_end=False)
        return place.take(1)

    def _evict_quiet(self, client: str) -> bool:
        """Close a connection that waits for a request (RFC 9112 section 9.5), so that this client gets its place.

        Connections of clients above their shares come first, then those that have waited longest. A client that has its
        share already gets only places of such clients, and its own.

        Returns:
            False when none has waited for MIN_QUIET_S.
        """
        share = self._places.share_of(client)
        is_within = self._places.held_by(client) < share
        candidates = []
        for listener, connection in self._group.connections():
            since = connection.quiet_since  # read once: its thread may reset it at any time
            if since and time.monotonic() - since >= MIN_QUIET_S:
                owner = connection.place.client
                is_above = self._places.held_by(owner) > share
                if is_above or is_within or owner == client:
                    candidates.append((not is_above, since, listener, connection))
        for _, since, listener, connection in sorted(candidates, key=lambda each: each[:2]):
            if connection.close_quiet(since):
                listener._evict(connection)
                return True
        return False

    def _candidates(self) -> list[Connection]:
        """Return the connections that have not been evicted."""
        with self._changed:
            return list(self._connections.keys() - self._evicted)

    def _evict(self, connection: Connection) -> None:
        """Give back the place of a connection whose thread is about to end."""
        with self._changed:
            if connection in self._connections and connection not in self._evicted:
                self._evicted.add(connection)
                connection.place.give(1)

    def _end(self, connection: Connection) -> None:
        """End a connection of a client above its share."""
        connection.end_early(too_many_connections())
        self._evict(connection)

    def _serve(self, connection: Connection, request: socket.socket) -> None:
        """Serve a connection until it ends. Runs in: the connection's thread."""
        try:
            connection.serve()
        except Exception:
            log.exception("unexpected error; the connection is closed")
        finally:
            request.close()
            self._remove(connection)

    def _remove(self, connection: Connection) -> None:
        with self._changed:
            if self._connections.pop(connection, None) is not None and connection not in self._evicted:
                connection.place.give(1)
            self._evicted.discard(connection)
            connection.place.close()
            self._changed.notify_all()

    # --- ending -------------------------------------------------------------------------------------------------------

    def stop(self, grace_s: float) -> None:
        """Stop accepting, close idle connections, wait `grace_s` for the others, then abort the rest. Idempotent.

        A connection without a request so far counts as busy, because its first request is about to arrive.

        Afterwards all threads have ended, except those stuck in a call that does not end with the connection.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        self.is_draining = True
        self.shutdown()
        self._accept_backlog()
        self.server_close()  # before any wait: it resets the connections that have entered the backlog meanwhile
        self._overflow.stop()
        with self._changed:
            threads = list(self._connections.values())
            for connection in self._connections:
                if since := connection.idle_since:  # not a silent one: its first request is about to arrive
                    connection.close_quiet(since)
            self._changed.wait_for(lambda: not self._connections, grace_s)
            if aborted := sum(connection.in_flight for connection in self._connections):
                log.warning(
                    "requests aborted at the end of the grace period", extra=fields(number=aborted, grace_s=grace_s)
                )
            for connection in self._connections:
                connection.abort()
        end = time.monotonic() + ABORT_TIMEOUT_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        self.linger.stop(max(grace_s, LINGER_STOP_S))
        for limit in (self.rejections, self._exhaustion, self._refused_origins.limit):
            limit.stop()
        os.close(self._wakeup)
        if self._spare_fd >= 0:
            os.close(self._spare_fd)


class ListenerGroup:
    """The listeners that share the limit of connections: a client at one may get a place of a client at another.

    Attributes:
        places: what each client holds of the places.
        listeners: the listeners; complete before the first one starts.
    """

    def __init__(self, settings: Settings) -> None:
        self.places = Account(settings.max_connections)
        self.listeners: list[Listener] = []

    def connections(self) -> list[tuple[Listener, Connection]]:
        """Return the connections that have not been evicted, each with its listener."""
        return [(listener, each) for listener in self.listeners for each in listener._candidates()]
