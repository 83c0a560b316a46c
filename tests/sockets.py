"""A connected pair of TCP sockets on the loopback interface."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["connected_pair", "sending"]


@contextmanager
def connected_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the two ends of one connection; both are closed with the block."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs, _ = server.accept()
        with theirs:
            yield ours, theirs


@contextmanager
def sending(target: socket.socket, pieces: Iterable[bytes]) -> Iterator[None]:
    """Send the pieces from another thread while the block runs."""
    thread = threading.Thread(target=lambda: [target.sendall(piece) for piece in pieces])
    thread.start()
    try:
        yield
    finally:
        thread.join()
