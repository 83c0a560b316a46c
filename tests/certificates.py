"""Certificates for tests, made by openssl: self-signed ones, and ones that such a one has signed."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

__all__ = ["Pair", "client_context", "make_pair"]


class Pair(NamedTuple):
    """The files of a certificate and its key."""

    certificate: Path
    key: Path

    def options(self) -> dict[str, Path]:
        """Return the options of the server."""
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    def replace(self, other: Pair) -> None:
        """Put the other pair's files in place of these, as renewal does: each at once, the key first."""
        for target, source in ((self.key, other.key), (self.certificate, other.certificate)):
            new = target.with_suffix(".new")
            new.write_bytes(source.read_bytes())
            os.replace(new, target)


def make_pair(folder: Path, name: str, authority: Pair | None = None) -> Pair:
    """Return a new certificate for a.test, localhost and 127.0.0.1, which the authority has signed, or itself."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    signed = ["-CA", str(authority.certificate), "-CAkey", str(authority.key)] if authority else []
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:a.test,DNS:localhost,IP:127.0.0.1", *signed,
         "-keyout", str(pair.key), "-out", str(pair.certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return pair


def client_context(trusted: Pair, *, client: Pair | None = None) -> ssl.SSLContext:
    """Return the configuration of a client that trusts a certificate, and may have one of its own."""
    context = ssl.create_default_context(cafile=str(trusted.certificate))
    if client:
        context.load_cert_chain(client.certificate, client.key)
    return context
