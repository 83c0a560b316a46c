"""Requests to a hub over HTTP: redirects, proxies, the token, and errors in the operator's words.

The token goes to the origin of the endpoint only, never with a redirect to another one. A redirect never leads from
https to http, and to a loopback or private address only if the endpoint has one itself.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote, urljoin, urlsplit

from ovserve import __version__
from ovserve.errors import HubError
from ovserve.hub.addresses import Resolve, connect, is_private_host
from ovserve.hub.listing import Listing, parse_listing

__all__ = ["DEFAULT_ENDPOINT", "HubClient", "Response"]

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_REDIRECTS = 5
MAX_DOCUMENT_BYTES = 32 * 1024 * 1024  # of a listing or a model index
MAX_RETRY_AFTER_S = 300.0  # the hub's rate limits are counted over five minutes
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_NUMBER = r"(?:0x[0-9a-f]+|[0-9]+)"
_ADDRESS = re.compile(rf"{_NUMBER}(?:\.{_NUMBER})*|.*:.*|localhost|.*\.localhost")  # as inet_aton(3) reads it
_FAULTS = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class _Url:
    """One absolute URL."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> _Url:
        """Parse an http or https URL. Raises ValueError."""
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{text[:200]!r} is not an http or https URL")
        if parts.username is not None:
            raise ValueError("the URL contains credentials")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if _UNPRINTABLE.search(target) or " " in target:
            raise ValueError("the URL contains a blank or a control character")
        return cls(parts.scheme, parts.hostname, port, target)

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port."""
        return self.scheme, self.host, self.port

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.target}"


class Response:
    """One response with status 2xx; its content is read in pieces.

    Attributes:
        status: the status code.
        linked: the fields X-Linked-Etag, X-Linked-Size and X-Repo-Commit as the hub itself sent them, in lower case.
    """

    def __init__(
        self,
        reply: http.client.HTTPResponse,
        connection: http.client.HTTPConnection,
        on_close: Callable[[http.client.HTTPConnection], None],
    ) -> None:
        self._reply = reply
        self._connection = connection
        self._on_close = on_close
        self.status = reply.status
        self.linked: dict[str, str] = {}

    def header(self, name: str) -> str:
        """Return a field's value, or ""."""
        return self._reply.getheader(name) or ""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, at the end of the content b"". Raises OSError and HTTPException."""
        return self._reply.read1(size)

    @property
    def length(self) -> int | None:
        """Number of bytes that the content should have, if the hub gives it."""
        text = self.header("content-length")
        return int(text[:19]) if text.isascii() and text.isdigit() else None

    def close(self) -> None:
        """Close the connection."""
        self._reply.close()
        self._connection.close()
        self._on_close(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HubClient:
    """Sends requests to one hub. Thread-safe: yes; each request has a connection of its own.

    Args:
        endpoint: base URL of the hub.
        token: the bearer token, or "".
        proxies: proxy URL by scheme; None: those of the environment (https_proxy, no_proxy).
        timeout_s: for a connection, and for each read.
        resolve: looks host names up.

    Raises:
        HubError: the endpoint is not a URL, or its name cannot be looked up.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        token: str = "",
        *,
        proxies: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        resolve: Resolve = socket.getaddrinfo,
    ) -> None:
        try:
            self._endpoint = _Url.parse(endpoint)
        except ValueError as error:
            raise HubError(f"HF_ENDPOINT: {error}") from None
        if _UNPRINTABLE.search(token) or " " in token:
            raise HubError("HF_TOKEN contains a blank or a control character")
        self.base_url = endpoint.rstrip("/")
        self._token = token
        self._proxies = dict(urllib.request.getproxies() if proxies is None else proxies)
        self._reads_no_proxy = proxies is None
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._tls = ssl.create_default_context()
        self._lock = threading.RLock()  # `stop` may be called by a signal's handler
        self._open: set[http.client.HTTPConnection] = set()
        self._is_private: bool | None = None
        self._is_stopped = False

    def listing(self, repository: str, revision: str) -> Listing:
        """Return the files of a repository. Raises HubError."""
        path = f"/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        with self.open(path, repository) as response:
            return parse_listing(self._read_json(response, f"{repository}: the listing"), repository)

    def document(self, listing: Listing, path: str) -> Any:
        """Return one small JSON file of a repository. Raises HubError."""
        with self.open(self.file_path(listing, path), listing.repository) as response:
            return self._read_json(response, f"{listing.repository}: {path}")

    @staticmethod
    def file_path(listing: Listing, path: str) -> str:
        """Return the path of a file's URL at the listing's commit."""
        return f"/{listing.repository}/resolve/{listing.commit}/{quote(path)}"

    def open(self, path: str, repository: str, headers: Mapping[str, str] | None = None) -> Response:
        """Send a GET request, follow its redirects, and return the response.

        Args:
            path: path and query below the endpoint.
            repository: its name, for messages.
            headers: further request fields.

        Raises:
            HubError: the hub refuses; `is_transient` if a later request may succeed.
        """
        url = _Url.parse(self.base_url + path)
        linked: dict[str, str] = {}
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, headers or {}, repository)
            if url.origin == self._endpoint.origin:
                for name in ("x-linked-etag", "x-linked-size", "x-repo-commit"):
                    if value := response.header(name):
                        linked[name] = value
            if response.status not in _REDIRECTS:
                response.linked = linked
                return self._check(response, repository)
            target = response.header("location")
            response.close()
            url = self._redirected(url, target, repository)
        raise HubError(f"{repository}: more than {MAX_REDIRECTS} redirects")

    def stop(self) -> None:
        """End all requests: those in flight fail, and so do new ones. Thread-safe: yes."""
        with self._lock:
            self._is_stopped = True
            for connection in self._open:
                _shut(connection)

    # --- one request --------------------------------------------------------------------------------------------------

    def _send(self, url: _Url, headers: Mapping[str, str], repository: str) -> Response:
        fields = {"user-agent": f"ovserve/{__version__}", "accept-encoding": "identity", **headers}
        if self._token and url.origin == self._endpoint.origin:
            fields["authorization"] = f"Bearer {self._token}"
        try:
            connection, target = self._connection(url)
            with self._lock:
                self._open.add(connection)
                if self._is_stopped:
                    _shut(connection)
            try:
                connection.request("GET", target, headers=fields)
                return Response(connection.getresponse(), connection, self._forget)
            except BaseException:
                connection.close()
                self._forget(connection)
                raise
        except _FAULTS as error:
            why = str(error) or type(error).__name__
            raise HubError(f"{repository}: {url.host} cannot be reached: {why}", is_transient=True) from None

    def _connection(self, url: _Url) -> tuple[http.client.HTTPConnection, str]:
        """Return a connection for a URL, direct or by a proxy, and the request target to send on it."""
        # A proxy looks the name up itself, so only an address in the URL can be checked.
        if proxy := self._proxy_of(url):
            if (
                _ADDRESS.fullmatch(url.host)
                and not self._may_be_private()
                and is_private_host(url.host, url.port, self._resolve)
            ):
                raise HubError(f"the hub sends to {url.host}, which is not a public address")
            if url.scheme == "http":
                return http.client.HTTPConnection(proxy.host, proxy.port, timeout=self._timeout_s), str(url)
            tunnel = http.client.HTTPSConnection(proxy.host, proxy.port, timeout=self._timeout_s, context=self._tls)
            tunnel.set_tunnel(url.host, url.port)
            return tunnel, url.target
        connection = http.client.HTTPConnection(url.host, url.port, timeout=self._timeout_s)
        opened = connect(
            url.host, url.port, self._timeout_s, may_be_private=self._may_be_private(), resolve=self._resolve
        )
        if url.scheme == "https":
            try:
                opened = self._tls.wrap_socket(opened, server_hostname=url.host)
            except BaseException:
                opened.close()
                raise
            connection.default_port = 443  # for the Host field
        connection.sock = opened
        return connection, url.target

    def _proxy_of(self, url: _Url) -> _Url | None:
        text = self._proxies.get(url.scheme) or self._proxies.get("all")
        if not text or (self._reads_no_proxy and urllib.request.proxy_bypass(url.host)):
            return None
        try:
            return _Url.parse(text if "://" in text else f"http://{text}")
        except ValueError as error:
            raise HubError(f"proxy for {url.scheme}: {error}") from None

    def _may_be_private(self) -> bool:
        if self._is_private is None:
            self._is_private = is_private_host(self._endpoint.host, self._endpoint.port, self._resolve)
        return self._is_private

    def _redirected(self, url: _Url, target: str, repository: str) -> _Url:
        try:
            found = _Url.parse(urljoin(str(url), target))
        except ValueError as error:
            raise HubError(f"{repository}: the hub redirects to a wrong place: {error}") from None
        if url.scheme == "https" and found.scheme != "https":
            raise HubError(f"{repository}: {url.host} redirects from https to http ({found.host})")
        return found

    def _forget(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._open.discard(connection)

    # --- responses ----------------------------------------------------------------------------------------------------

    def _check(self, response: Response, repository: str) -> Response:
        """Return the response if it has the content that was asked for. Raises HubError."""
        if response.status in (200, 206):
            if response.header("content-encoding") in ("", "identity"):
                return response
            response.close()
            raise HubError(f"{repository}: the hub sends compressed content, which was not asked for")
        status, kind = response.status, response.header("x-error-code")
        said = _UNPRINTABLE.sub("?", response.header("x-error-message"))[:200]
        wait = response.header("retry-after")
        response.close()
        page = f"{self.base_url}/{repository}"
        if status in (401, 403) and kind == "GatedRepo":
            token = "HF_TOKEN to a token of that account" if not self._token else "HF_TOKEN to a token that may read it"
            raise HubError(f"{repository} is gated: accept its licence at {page}, and set {token}")
        if status == 401 or kind == "RepoNotFound":
            hint = "check HF_TOKEN" if self._token else "if it is private, set HF_TOKEN"
            raise HubError(f"{repository}: no such repository at {self.base_url}; {hint}")
        if status == 403:
            raise HubError(f"{repository}: the hub denies access: {said or 'status 403'}; check HF_TOKEN")
        if kind in ("RevisionNotFound", "EntryNotFound") or status == 404:
            what = "revision" if kind == "RevisionNotFound" else "file or revision"
            raise HubError(f"{repository}: no such {what} at {self.base_url}")
        error = HubError(
            f"{repository}: the hub answers with status {status}{f': {said}' if said else ''}",
            is_transient=status in _RETRIED,
        )
        if wait.isascii() and wait.isdigit():
            error.retry_after_s = min(float(wait[:9]), MAX_RETRY_AFTER_S)
        error.status = status
        raise error

    def _read_json(self, response: Response, what: str) -> Any:
        try:
            content = bytearray()
            while piece := response.read(1 << 16):
                content += piece
                if len(content) > MAX_DOCUMENT_BYTES:
                    raise HubError(f"{what} is longer than {MAX_DOCUMENT_BYTES} bytes")
            if response.length is not None and len(content) < response.length:
                raise HubError(f"{what} ends after {len(content)} of {response.length} bytes", is_transient=True)
            return json.loads(content)
        except _FAULTS as error:
            raise HubError(f"{what} cannot be read: {error or type(error).__name__}", is_transient=True) from None
        except (ValueError, RecursionError):
            raise HubError(f"{what} is no JSON document") from None
        finally:
            response.close()


def _shut(connection: http.client.HTTPConnection) -> None:
    """End whatever another thread waits for on a connection."""
    with contextlib.suppress(OSError, AttributeError):  # not connected yet, or closed
        connection.sock.shutdown(socket.SHUT_RDWR)
