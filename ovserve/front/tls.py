"""TLS: the certificate in use, and connections over TLS with the calls of a socket.

    Certificates ──wrap──▶ TlsSocket(socket, SSLContext) ──handshake──▶ recv, recv_into, recvmsg_into, sendmsg

The cryptography runs over memory buffers (`ssl.MemoryBIO`), and the socket stays an ordinary one. So the kernel's
timeouts, MSG_DONTWAIT, POLLRDHUP and shutdown(2) from another thread work as on a connection without TLS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError, may_pass
from ovserve.front.request import escape_for_log
from ovserve.logs import LogLimit, fields
from ovserve.settings.options import Settings

__all__ = ["Certificates", "TlsSocket", "log_failed_handshake", "read_certificates"]

RECEIVE_BYTES = 64 * 1024  # of ciphertext with one system call: four records of the largest size
ENCRYPTED_BYTES = 64 * 1024  # of plaintext encrypted at once; so much ciphertext waits for a slow reader
CHECK_S = 1.0  # between looks at the certificate's files

log = logging.getLogger(__name__)


class TlsSocket:
    """A connected, blocking socket with TLS: the socket calls that a connection makes, with their meaning.

    A call without MSG_DONTWAIT waits as long as the socket's SO_RCVTIMEO or SO_SNDTIMEO and then raises
    BlockingIOError. An end of the stream without a closing alert counts as end-of-file, as without TLS: the framing of
    HTTP shows what is missing. Alerts and malformed records raise ssl.SSLError, an OSError.

    Thread-safe: no, except `has_unread_bytes`.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Take a connected socket; the caller closes it."""
        self._socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._plain = b""  # decrypted by a peek
        self._ciphertext = memoryview(b"")  # not accepted by the socket yet
        self._held = 0  # bytes of plaintext in `_ciphertext` that `sendmsg` has not reported as sent
        self._is_receiving = False  # ciphertext was taken from the socket that may hold unread bytes
        self._is_ended = False

    @property
    def family(self) -> int:
        """The address family of the socket."""
        return self._socket.family

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._socket.fileno()

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set an option of the socket."""
        self._socket.setsockopt(level, option, value)

    # --- handshake ----------------------------------------------------------------------------------------------------

    def handshake(self, timeout_s: float) -> None:
        """Complete the handshake.

        Raises:
            TimeoutError: it took longer.
            OSError: it failed, or the connection was lost.
        """
        end = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._socket)
        while not self.advance_handshake():
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the TLS handshake took too long")
            poller.modify(self._socket, select.POLLOUT if self._ciphertext else select.POLLIN)
            poller.poll(left * 1000)

    def advance_handshake(self) -> bool:
        """Do what the handshake can do without waiting; return whether it is complete. Raises OSError."""
        is_complete = False
        while not is_complete:
            try:
                self._tls.do_handshake()
                is_complete = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self._flush_quietly()  # the alert that says why
                raise
            try:
                self._flush(socket.MSG_DONTWAIT)
                if not is_complete:
                    self._receive(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
        return True

    # --- receiving ----------------------------------------------------------------------------------------------------

    def has_unread_bytes(self) -> bool:
        """Return whether bytes have arrived that were not returned yet. Thread-safe: yes."""
        if self._is_receiving or self._plain:
            return True
        try:
            return bool(self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
        except OSError:
            return False

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return up to `size` bytes, empty at end-of-file; with MSG_PEEK, they stay. Raises OSError."""
        if flags & socket.MSG_PEEK and not self._plain:
            self._plain = bytes(self._read(flags, RECEIVE_BYTES))
        if self._plain:
            data = self._plain[:size]
            if not flags & socket.MSG_PEEK:
                self._plain = self._plain[size:]
        else:
            data = bytes(self._read(flags, size))
        self._note_unread()
        return data

    def recv_into(self, view: memoryview, size: int = 0, flags: int = 0) -> int:
        """Receive into the view; with MSG_WAITALL until it is full. Return the number of bytes. Raises OSError."""
        view = view[: size or len(view)]
        count = min(len(view), len(self._plain))
        if count:
            view[:count], self._plain = self._plain[:count], self._plain[count:]
        while count < len(view):
            may_wait = not count or flags & socket.MSG_WAITALL
            try:
                received = self._read(flags if may_wait else socket.MSG_DONTWAIT, len(view) - count, view[count:])
            except BlockingIOError:
                if count:
                    return count
                raise
            if not received:
                break
            count += received
        self._note_unread()
        return count

    def recvmsg_into(
        self, buffers: Sequence[memoryview], _ancillary: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, None]:
        """Receive into the first buffer, and into the next ones what has arrived beyond. Raises OSError."""
        count = 0
        for buffer in buffers:
            try:
                received = self.recv_into(buffer, 0, flags)
            except BlockingIOError:
                if count:
                    break
                raise
            count += received
            if received < len(buffer):
                break
            flags = socket.MSG_DONTWAIT
        return count, [], 0, None

    def _read(self, flags: int, *arguments: Any) -> Any:
        """Return what the TLS layer's `read` returns, receiving what it needs; nothing at end-of-file."""
        end = None
        while not self._is_ended:
            try:
                found = self._tls.read(*arguments)
            except ssl.SSLWantReadError:
                self._is_receiving = False
                self._flush_quietly()  # the answer to a change of keys
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                break
            else:
                if not found:
                    break
                return found
            if end is None:
                end = time.monotonic() + self._receive_timeout_s()
            elif time.monotonic() >= end and not flags & socket.MSG_DONTWAIT:
                raise BlockingIOError  # a record that arrives byte by byte
            self._receive(flags)
        self._is_ended = True
        return b"" if len(arguments) == 1 else 0

    def _note_unread(self) -> None:
        self._is_receiving = bool(self._tls.pending() or self._incoming.pending)

    def _receive(self, flags: int) -> None:
        """Receive ciphertext, or the end of the stream. Raises BlockingIOError and OSError."""
        if not flags & socket.MSG_DONTWAIT:
            self._socket.recv(1, socket.MSG_PEEK)  # a connection that waits here has nothing unread
        self._is_receiving = True
        try:
            data = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._is_receiving = False
            raise
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _receive_timeout_s(self) -> float:
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
        seconds, microseconds = struct.unpack("@ll", raw)
        return float(seconds + microseconds / 1e6) or float("inf")

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """Send bytes as `sendmsg` does."""
        return self.sendmsg([data], [], flags)

    def sendmsg(self, buffers: Sequence[bytes | memoryview], _ancillary: Sequence[object] = (), flags: int = 0) -> int:
        """Encrypt and send the beginning of the buffers; return the number of bytes, 0 if only a part of one was sent.

        The last byte counts when the socket has accepted all ciphertext. The next call must begin with the bytes that
        were not counted. Raises BlockingIOError and OSError.
        """
        if not self._held:
            self._flush(flags)
            data = _beginning(buffers)
            if not data:
                return 0
            self._tls.write(data)
            self._held = len(data)
            self._take_outgoing()
        sent = self._socket.send(self._ciphertext, flags)
        self._ciphertext = self._ciphertext[sent:]
        counted = min(sent, self._held - 1) if self._ciphertext else self._held
        self._held -= counted
        return counted

    def close_notify(self) -> None:
        """Send the alert that ends the stream, if the socket accepts it at once; never raises OSError."""
        if self._held or self._ciphertext:
            return
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        self._flush_quietly()

    def _take_outgoing(self) -> None:
        self._ciphertext = memoryview(self._outgoing.read())

    def _flush(self, flags: int) -> None:
        """Send all ciphertext. Raises BlockingIOError and OSError."""
        while self._ciphertext or self._outgoing.pending:
            if not self._ciphertext:
                self._take_outgoing()
            self._ciphertext = self._ciphertext[self._socket.send(self._ciphertext, flags) :]

    def _flush_quietly(self) -> None:
        """Send what the socket accepts at once, unless a call of `sendmsg` has to go on first.

        Raises ConnectionError when a client makes answers and does not read them.
        """
        if self._outgoing.pending > ENCRYPTED_BYTES:
            raise ConnectionAbortedError("the client does not read")
        if not self._held:
            with contextlib.suppress(OSError):
                self._flush(socket.MSG_DONTWAIT)


def _beginning(buffers: Sequence[bytes | memoryview]) -> bytes | memoryview:
    """Return at most ENCRYPTED_BYTES from the beginning of the buffers."""
    first = buffers[0]
    if len(buffers) == 1 or len(first) >= ENCRYPTED_BYTES:
        return memoryview(first)[:ENCRYPTED_BYTES]
    taken: list[bytes | memoryview] = []
    room = ENCRYPTED_BYTES
    for buffer in buffers:
        if not room:
            break
        part = memoryview(buffer)[:room]
        taken.append(part)
        room -= len(part)
    return b"".join(taken)


class Certificates:
    """The certificate in use, read again when its files change. Thread-safe: yes.

    While the files are being replaced, or if the new ones cannot be used, the old certificate stays in use.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        """Read the files. Raises SettingsError if they cannot be used."""
        self._paths = certificate, key, client_ca
        self._lock = threading.Lock()  # held by the one thread that looks at the files
        self._signature = self._read_signature()
        self._checked_at = time.monotonic()
        self._context = _load(*self._paths)

    def wrap(self, connection: socket.socket) -> TlsSocket:
        """Return a connection over TLS whose handshake has not begun."""
        self._refresh()
        return TlsSocket(connection, self._context)

    def _refresh(self) -> None:
        if time.monotonic() - self._checked_at < CHECK_S or not self._lock.acquire(blocking=False):
            return
        try:
            self._checked_at = time.monotonic()
            signature = self._read_signature()
            if signature == self._signature:
                return
            self._signature = signature
            self._context = _load(*self._paths)
            log.info("the TLS certificate was read again", extra=fields(certificate=self._paths[0]))
        except SettingsError as error:
            log.warning("the new TLS certificate cannot be used, the old one stays", extra=fields(why=str(error)))
        finally:
            self._lock.release()

    def _read_signature(self) -> list[tuple[int, ...]]:
        """Return what changes when a file is written or replaced."""
        found: list[tuple[int, ...]] = []
        for path in self._paths:
            try:
                status = os.stat(path) if path else None
            except OSError:
                status = None
            found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size) if status else ())
        return found


def read_certificates(settings: Settings) -> Certificates | None:
    """Return the certificate of the options; None without one. Raises SettingsError."""
    if settings.tls_certificate is None:
        return None
    key = settings.tls_key or settings.tls_certificate
    return Certificates(settings.tls_certificate, key, settings.tls_client_ca)


def log_failed_handshake(limit: LogLimit, address: str, error: OSError) -> None:
    """Log why a TLS handshake failed: the peer is no HTTPS client, does not trust the certificate, or is too slow."""
    why = getattr(error, "reason", None) or str(error)
    limit.log(log, logging.INFO, "TLS handshake failed", address=address, why=escape_for_log(str(why)))


def _load(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """Return the configuration of TLS: version 1.2 or later, HTTP/1.1. Raises SettingsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols(["http/1.1"])
    for option, path in (("tls_certificate", certificate), ("tls_key", key), ("tls_client_ca", client_ca)):
        if path is not None:
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise SettingsError(f"{option} {path}: {error.strerror}", is_transient=may_pass(error)) from None
    try:
        context.load_cert_chain(certificate, key, password="")  # an empty one, so that OpenSSL asks for none
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(f"tls_certificate {certificate}, tls_key {key}: {_reason(error)}") from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise SettingsError(f"tls_client_ca {client_ca}: {_reason(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: OSError) -> str:
    """Return why OpenSSL refuses a file, in words."""
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return str(reason).lower().replace("_", " ")
