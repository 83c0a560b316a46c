"""Measure a client's small edit beside 16 addresses that hold all connections, against the same beside idle ones.

    python benchmarks/bench_shares.py
    python benchmarks/bench_shares.py --rounds 10 --save

One server with the built-in model. Each round measures both arrangements, in alternating order, with as many
connections open. Each edit of the measured client uses a new connection from an address of its own.

idle      every address has its connections idle after one answered request
hostile   every address has silent connections, and uploads that are as slow as the server allows; some have results of
          megabytes that they do not read; a connection that the server ends is opened again
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import stats
from benchmarks.edits import BUILTIN_NAME
from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer
from tests.rawclient import RawClient

ADDRESSES = [f"127.0.0.{number}" for number in range(2, 18)]
MEASURED = "127.0.0.99"
CONNECTIONS = 512  # the server's limit; all of them are used
SLOW_UPLOADS = 8  # of each address; its other connections are silent
SLOW_READERS = 4  # addresses that do not read the result of one more edit
UPLOAD_BYTES = 4 << 20  # sent at once; then SLOW_BYTES with each tick
ANNOUNCED_BYTES = 64 << 20
SLOW_BYTES = 1024  # twice the server's minimum rate
READ_PX = 1024  # of a noise image that is returned as it is (strength 0) and not read
TICK_S = 0.5  # between bytes of the slow uploads, and between checks for ended connections
SETTLE_S = 1.0
PATIENCE_S = 150.0
IMAGE = Path(__file__).resolve().parents[1] / "tests" / "data" / "red_circle.png"
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


def edit_request(image: bytes, announced: int = 0, **fields: object) -> bytes:
    """Return the request for an edit; with `announced`, its body claims to have so many bytes."""
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in {"model": BUILTIN_NAME, "prompt": "a red circle", **fields}.items()
    ]
    parts += [b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n', image]
    body = b"".join(parts) + (b"" if announced else b"\r\n--b--\r\n")
    head = "POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % (announced or len(body)) + body


def noise_png(side_px: int) -> bytes:
    """Return a PNG that does not compress."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(7).integers(0, 256, (side_px, side_px, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Crowd:
    """The connections of all addresses, kept open by a thread until the end of the `with` block."""

    def __init__(self, port: int, *, is_hostile: bool) -> None:
        self._port = port
        self._clients: list[tuple[RawClient, str, bytes]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep)
        upload = edit_request(b"x" * UPLOAD_BYTES, ANNOUNCED_BYTES)
        read = edit_request(noise_png(READ_PX), strength=0, size=f"{READ_PX}x{READ_PX}") if is_hostile else b""
        each = CONNECTIONS // len(ADDRESSES)
        for index, address in enumerate(ADDRESSES):
            requests = [HEALTH] * each
            if is_hostile:
                first = [read] if index < SLOW_READERS else [b""]
                requests = first + [upload] * SLOW_UPLOADS + [b""] * (each - SLOW_UPLOADS - 1)
            self._clients += [(self._open(address, request), address, request) for request in requests]
        self.reopened = 0

    def _open(self, address: str, request: bytes) -> RawClient:
        client = RawClient(self._port, address=address, receive_buffer=65536)
        if request:
            client.send(request)
        if request == HEALTH:
            client.read_response()
        return client

    def _keep(self) -> None:
        while not self._ending.wait(TICK_S):
            for index, (client, address, request) in enumerate(self._clients):
                if len(request) > UPLOAD_BYTES:
                    client.send(b"x" * SLOW_BYTES)
                is_read = request and len(request) < UPLOAD_BYTES
                if not is_read and client.has_answer(0):  # ended by the server
                    client.close()
                    self._clients[index] = (self._open(address, request), address, request)
                    self.reopened += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        for client, _, _ in self._clients:
            with contextlib.suppress(OSError):
                client.abandon()


def time_edits(port: int, number: int) -> Iterator[float]:
    """Yield the seconds of each edit, its connection included. Raises RuntimeError for another status than 200."""
    request = edit_request(IMAGE.read_bytes(), strength=0.7, seed=1, num_inference_steps=4)
    for _ in range(number):
        started = time.perf_counter()
        with RawClient(port, address=MEASURED) as client:
            response = client.send(request).read_response()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.content[:300]!r}")
        yield time.perf_counter() - started


def _is_free(server: FaultServer) -> bool:
    status = server.model_status()
    return bool(status["running"] == status["queued"] == 0)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds (%(default)s)")
    parser.add_argument("--edits", type=int, default=10, help="edits in each arrangement of a round (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    from benchmarks.metadata import collect
    from benchmarks.results import Result

    result = Result("shares", collect(builtin_directory()))
    with tempfile.TemporaryDirectory() as spool:
        arguments = ("--log_level", "error", "--max_connections", str(CONNECTIONS))
        with FaultServer(Path(spool), *arguments, real=True) as server:
            list(time_edits(server.port, 5))
            for number in range(options.rounds):
                medians: dict[str, float] = {}
                for name in ("idle", "hostile") if number % 2 else ("hostile", "idle"):
                    with Crowd(server.port, is_hostile=name == "hostile") as crowd:
                        # The crowd's own edits are answered, or at least made.
                        server.until(lambda: _is_free(server), PATIENCE_S)
                        time.sleep(SETTLE_S)
                        values = list(time_edits(server.port, options.edits))
                    result.add("latency", values, case={"others": name})
                    result.add("connections reopened", [crowd.reopened], unit="", better="none", case={"others": name})
                    medians[name] = stats.percentile(values, 50)
                    server.until(lambda: server.segments() == [], PATIENCE_S)
                result.add("latency ratio, hostile over idle", [medians["hostile"] / medians["idle"]], unit="")
    print(result.report())
    latencies = [result.find("latency", others=name).values for name in ("hostile", "idle")]
    print("median over median, all edits:", stats.ratio(*latencies))
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
