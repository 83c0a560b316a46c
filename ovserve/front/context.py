"""What the connections of one listener share."""

from __future__ import annotations

from typing import Any, Protocol

from ovserve.api.exchange import Api
from ovserve.front.access import Access
from ovserve.front.http1.forwarded import TrustedProxies
from ovserve.front.http1.response import Responses
from ovserve.front.linger import Linger
from ovserve.front.run_token import RunToken
from ovserve.front.tls import Certificates
from ovserve.logs import LogLimit
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore

__all__ = ["ConnectionContext"]


class ConnectionContext(Protocol):
    """What the connections of one listener share; the listener implements it."""

    @property
    def settings(self) -> Settings:
        """The limits."""

    @property
    def api(self) -> Api[Any]:
        """Answers requests."""

    @property
    def spool(self) -> BlobStore:
        """Stores uploads."""

    @property
    def responses(self) -> Responses:
        """Encodes response heads."""

    @property
    def access(self) -> Access:
        """Decides which requests are served."""

    @property
    def proxies(self) -> TrustedProxies:
        """The reverse proxies whose forwarded fields count."""

    @property
    def certificates(self) -> Certificates | None:
        """The certificate for connections with TLS; None: connections without TLS."""

    @property
    def linger(self) -> Linger:
        """Takes over connections whose client may still send after the answer."""

    @property
    def rejections(self) -> LogLimit:
        """Limits the log lines of rejected connections."""

    @property
    def run_token(self) -> RunToken:
        """Shared by the connection threads."""

    @property
    def closes_connections(self) -> bool:
        """Whether responses close their connections, because the server will drain soon."""

    @property
    def is_draining(self) -> bool:
        """Whether each connection ends after its current exchange."""
