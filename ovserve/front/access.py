"""Decides, from the head alone, whether a request may reach its route: Host, Origin, admin key, API key.

    Host ──▶ 421   Origin, Sec-Fetch-Site ──▶ 403   admin route ──▶ 403   API key ──▶ 401

The peer's address never decides: a proxy or a browser on the same machine has a local one too.
"""

from __future__ import annotations

import logging
import threading

from ovserve.api.exchange import RouteMatch
from ovserve.errors import Forbidden, MisdirectedRequest
from ovserve.front.http1.origins import HostRule, OriginRule
from ovserve.front.keys import Keys
from ovserve.front.request import Request, escape_for_log
from ovserve.logs import LogLimit
from ovserve.settings.options import Settings

__all__ = ["Access", "RefusedOrigins"]

MAX_REMEMBERED_ORIGINS = 1000  # then they are forgotten, so that invented ones cannot fill the memory
SHOWN_CHARS = 100  # of a client's own text in a message

log = logging.getLogger(__name__)


class RefusedOrigins:
    """Logs refused origins, each once. Thread-safe: yes, one lock.

    Attributes:
        limit: of the log lines, for a client that invents origins.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self.limit = LogLimit("requests from foreign origins")

    def note(self, origin: str) -> None:
        """Log that requests of this origin are refused, if it is a new one."""
        with self._lock:
            if origin in self._seen:
                return
            if len(self._seen) >= MAX_REMEMBERED_ORIGINS:
                self._seen.clear()
            self._seen.add(origin)
        message = "requests of a foreign origin are refused; add it to allowed_origins if they are wanted"
        self.limit.log(log, logging.WARNING, message, origin=escape_for_log(origin))


class Access:
    """The rules of one listener. Thread-safe: immutable; a reload replaces the object.

    Args:
        settings: `admin_listen`, and the options of Host.
        keys: the API keys.
        admin_keys: the admin keys.
        origins: the origins that may use the API.
        refused: logs the others.
        is_local: whether every listening address is loopback.
        is_admin: whether this is the admin listener.
        is_socket: whether it is a Unix socket, which no browser can reach.
    """

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        admin_keys: Keys,
        *,
        origins: OriginRule,
        refused: RefusedOrigins,
        is_local: bool,
        is_admin: bool = False,
        is_socket: bool = False,
    ) -> None:
        self.keys = keys
        self.admin_keys = admin_keys
        self._origins = origins
        self._refused = refused
        self._is_admin = is_admin
        self._is_socket = is_socket
        self._has_admin_listener = settings.admin_listen is not None
        # On the admin listener, API keys protect nothing.
        self._hosts = HostRule(settings, is_needed=is_local and (is_admin or not keys))

    def check(self, request: Request, match: RouteMatch) -> None:
        """Check a request, and set `request.is_verified` if it has a configured API key.

        Raises:
            MisdirectedRequest: its Host names another host.
            Forbidden: it comes from a foreign web page, or it is an admin request without an admin key.
            Unauthorized: it needs an API key, and has none or an unknown one.
        """
        if not self._is_socket and not match.is_health:
            host = request.header("host")
            if not self._hosts.allows(host):
                raise MisdirectedRequest(
                    f"This server does not serve the host {host[:SHOWN_CHARS] if host else host!r}. If the name is "
                    "yours, add it to the option allowed_hosts."
                )
        if not match.is_public:
            self._check_origin(request)
        if match.is_admin or (match.is_operator and self._has_admin_listener):
            self._check_admin(request, match)
        elif not (match.is_operator and (self._is_admin or self._has_admin_key(request))):
            self.keys.check(request, is_open=match.is_open)

    def _check_origin(self, request: Request) -> None:
        """Raise Forbidden for a request of a foreign web page. Programs that are no browsers send neither field."""
        origin, host = request.header("origin"), request.header("host")
        if origin is None:
            if self._origins.allows_site(request.header("sec-fetch-site"), host):
                return
            origin = "unknown"  # the browser has sent only Sec-Fetch-Site
        elif self._origins.allows(origin, host):
            return
        self._refused.note(origin)
        raise Forbidden(
            f"Requests of web pages of the origin {origin[:SHOWN_CHARS]!r} are refused. If the page is yours, the "
            "server's log names the option that allows it."
        )

    def _check_admin(self, request: Request, match: RouteMatch) -> None:
        """Raise Forbidden without an admin key, except on the admin listener.

        There, browsers may only read: a local web page must not be able to reload the server.
        """
        is_browser = request.header("origin") is not None or request.header("sec-fetch-site") is not None
        if self._has_admin_key(request) or (self._is_admin and not (match.is_admin and is_browser)):
            return
        raise Forbidden(
            "This path needs an admin key (options admin_key and admin_key_file), or the admin listener (option "
            "admin_listen), where browsers may only read."
        )

    def _has_admin_key(self, request: Request) -> bool:
        return bool(request.api_key) and (
            self.admin_keys.matches(request.api_key) or self.keys.is_admin(request.api_key)
        )
