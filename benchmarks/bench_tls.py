"""Measure what TLS costs: the same requests to one server at an address with TLS and at one without.

    python benchmarks/bench_tls.py
    python benchmarks/bench_tls.py --rounds 20 --save

The server has toy workers, which answer at once, so that the transport is most of the work. Rounds alternate the order
of the two addresses. All connections are in this process, so client and server share the machine's cores.

request      a health check on a persistent connection: each of the clients sends the next one when it has the answer
connection   the same on a new connection: with TLS, a handshake without resumption
upload       an edit whose image has 8 MiB, on a persistent connection
bad clients  the first again, beside connections that begin handshakes and do not finish them
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import stats
from ovserve.models.profile import builtin_directory
from tests.certificates import client_context, make_pair
from tests.faultserver import TINY_PNG, FaultServer

CLIENTS = 4
REQUESTS = 200  # of each client in a round
CONNECTIONS = 50  # of each client in a round
UPLOADS = 4  # of each client in a round
UPLOAD_BYTES = 8 << 20
HANDSHAKES = 64  # that are not finished, at a time
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the beginning of a ClientHello
TIMEOUT_S = 60.0
NAMES = ("plain", "tls")


class Caller:
    """Sends requests to one address.

    Args:
        url: its URL.
        context: trusts the server's certificate.
    """

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 0
        self._context = context if parts.scheme == "https" else None

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection, which is opened with its first request."""
        if self._context is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        return http.client.HTTPSConnection(self.host, self.port, timeout=TIMEOUT_S, context=self._context)

    def requests(self, count: int) -> list[float]:
        """Return the seconds of each health check on one connection; the first is not counted."""
        with contextlib.closing(self.connect()) as client:
            return [_timed(lambda: _get(client)) for _ in range(count + 1)][1:]

    def connections(self, count: int) -> list[float]:
        """Return the seconds of each health check with its connection."""

        def ask() -> None:
            with contextlib.closing(self.connect()) as client:
                _get(client)

        return [_timed(ask) for _ in range(count)]

    def uploads(self, count: int) -> list[float]:
        """Return the seconds of each edit on one connection; the first is not counted."""
        body = (
            b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\necho\r\n'
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
            + TINY_PNG
            + bytes(UPLOAD_BYTES)
            + b"\r\n--b--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        with contextlib.closing(self.connect()) as client:

            def ask() -> None:
                client.request("POST", "/v1/images/edits", body, headers)
                _read(client)

            return [_timed(ask) for _ in range(count + 1)][1:]


def _get(client: http.client.HTTPConnection) -> None:
    client.request("GET", "/v2/health/live")
    _read(client)


def _read(client: http.client.HTTPConnection) -> None:
    response = client.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {content[:300]!r}")


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def together(call: Callable[[], list[float]]) -> tuple[list[float], float]:
    """Make the call in CLIENTS threads at once; return all its values, and values a second."""
    found: list[float] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.extend(call())
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(CLIENTS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found, len(found) / (time.perf_counter() - started)


@contextmanager
def unfinished_handshakes(caller: Caller) -> Iterator[None]:
    """Hold connections that have sent the beginning of a ClientHello, or of a request."""
    held: list[socket.socket] = []
    try:
        for _ in range(HANDSHAKES):
            held.append(socket.create_connection((caller.host, caller.port), TIMEOUT_S))
            held[-1].sendall(HELLO)
        yield
    finally:
        for connection in held:
            connection.close()


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    from benchmarks.metadata import collect
    from benchmarks.results import Result

    result = Result("tls", collect(builtin_directory()))
    with tempfile.TemporaryDirectory() as folder:
        pair = make_pair(Path(folder), "bench")
        listen = ["--listen", "http://127.0.0.1:0,https://127.0.0.1:0", "--log_level", "error"]
        certificate = ["--tls_certificate", str(pair.certificate), "--tls_key", str(pair.key)]
        with FaultServer(Path(folder), *listen, *certificate) as server:
            server.until(lambda: len(server.lines) >= 2)
            urls = [line.removeprefix("ready ") for line in server.lines if line.startswith("ready ")]
            context = client_context(pair)
            callers = {"tls" if url.startswith("https:") else "plain": Caller(url, context) for url in urls}
            for number in range(options.rounds):
                for name in NAMES if number % 2 else reversed(NAMES):
                    caller, case = callers[name], {"address": name}
                    kinds = {
                        "request": lambda caller=caller: caller.requests(REQUESTS),
                        "connection": lambda caller=caller: caller.connections(CONNECTIONS),
                        "upload": lambda caller=caller: caller.uploads(UPLOADS),
                    }
                    for kind, call in kinds.items():
                        values, rate = together(call)
                        result.add(f"{kind} time", values, case=case)
                        result.add(f"{kind} rate", [rate], unit="1/s", better="higher", case=case)
                    with unfinished_handshakes(caller):
                        values, rate = together(kinds["request"])
                    result.add("request time, bad clients", values, case=case)
    print(result.report())
    for figure in ("request time", "connection time", "upload time", "request time, bad clients"):
        tls, plain = (result.find(figure, address=name).values for name in ("tls", "plain"))
        p99 = stats.percentile(tls, 99) / stats.percentile(plain, 99)
        print(f"{figure}: median over median {stats.ratio(tls, plain)}, 99th percentiles {p99:.2f}")
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
