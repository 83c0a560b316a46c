"""Measure requests per second and latency of the HTTP front end, against FastAPI and a bare standard-library server.

FastAPI runs on uvicorn and on granian, whose HTTP part is written in Rust.

    python benchmarks/bench_server.py
    python benchmarks/bench_server.py --clients 1 8 64 512 --rounds 5 --save

Each server runs in its own process and does the same work: it receives a POST of a multipart edit with a 64 kB image on
a persistent connection, computes the CRC-32 of the image (the toy engine), and sends a JSON reply of 1.4 kB. Every
reply is checked. `ovserve+worker` is the whole server: routes, validation, dispatcher, and a worker process in which
the toy engine runs; the others compute in the thread or task of the request.

The servers are loaded one after another in short slices, and throughputs are compared slice by slice, so that a
disturbance of the machine affects all of them. The CPU time of the server process is measured too; other work on the
machine changes it less.

The baselines use their fastest set-up: uvicorn with uvloop and httptools and an async route; granian with uvloop and
one worker process; the standard library with buffered writes, and without most checks of a safe server. All of them log
each request, to /dev/null.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.edits import BUILTIN_NAME, BUILTIN_PATH
from benchmarks.metadata import collect
from benchmarks.results import Result
from benchmarks.servers import process_tree
from benchmarks.stats import estimate, ratio

PATH = "/v1/images/edits"
IMAGE_BYTES = 64 * 1024
PICTURE = base64.b64encode(bytes(range(256)) * 4).decode()
BOUNDARY = "4f1c7d2e9a6b48d3b0c5e8f7a1d2c3b4"
# The front end reads only this head of a picture: PNG, 64 by 64 pixels.
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0@\0\0\0@\x08\2\0\0\0%\x0b\xe6\x89\0\0\xff\0IDAT"
STOP_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0
WARM_UP_S = 0.5
MAX_CONNECTIONS = BACKLOG = 2048  # of ovserve; the others have no limit of connections
VALUES_KEPT = 200  # latencies kept from one slice


def reply_of(image: bytes | memoryview, prompt: str) -> dict[str, Any]:
    """Run the toy engine: return a reply of the usual form, with the CRC-32 of the picture."""
    return {"created": 1713833628, "crc": zlib.crc32(image), "prompt": prompt, "data": [{"b64_json": PICTURE}]}


def announce(port: int) -> None:
    """Print the port, then redirect standard output to /dev/null: nothing reads it any more, and uvicorn logs there."""
    print(port, flush=True)
    announce_nothing()


def announce_nothing() -> None:
    """Redirect standard output to /dev/null."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)


# --- servers, each in its own process ---------------------------------------------------------------------------------


def serve_ovserve() -> None:
    """Serve with ovserve's front end, with every check on."""
    import json

    from ovserve.api.exchange import Exchange, JsonReply, Reply
    from ovserve.errors import ApiError, NotFound
    from ovserve.front.listener import Listener
    from ovserve.logs import configure_logs
    from ovserve.settings.options import Settings
    from ovserve.wire.local.spool import Spool, default_directory

    class OpenRoute:
        is_health, is_open = False, True
        is_admin = is_operator = is_public = False

    class Toy:
        def match(self, method: str, path: str) -> OpenRoute:
            return OpenRoute()

        def note_end(self, exchange: Any, match: Any, end: Any) -> None:
            pass

        def count_refused(self, error: ApiError) -> None:
            pass

        def answer(self, exchange: Exchange, match: OpenRoute) -> Reply:
            if exchange.path != PATH or exchange.method != "POST":
                raise NotFound("no such path")
            form = exchange.read_form()
            with form.uploads[0].view() as image:
                return JsonReply([json.dumps(reply_of(image, dict(form.fields)["prompt"])).encode()])

    configure_logs("info", "text")
    with tempfile.TemporaryDirectory(dir=default_directory()) as folder:
        settings = Settings(port=0, max_connections=MAX_CONNECTIONS, backlog=BACKLOG)
        spool = Spool(Path(folder), settings.spool_bytes, None, settings.spool_warm_bytes)
        listener = Listener(settings, Toy(), spool)
        listener.start()
        announce(listener.port)
        sys.stdin.read()
        listener.stop(0)


def make_app() -> Any:
    """Return the application of FastAPI."""
    from fastapi import FastAPI, File, Form, UploadFile

    app = FastAPI()

    async def edit(image, prompt, n=1, size="auto"):  # type: ignore[no-untyped-def]
        return reply_of(await image.read(), prompt)

    # FastAPI resolves annotations given as text in the module's globals, where these types are not.
    edit.__annotations__ = {
        "image": Annotated[UploadFile, File()],
        "prompt": Annotated[str, Form()],
        "n": Annotated[int, Form()],
        "size": Annotated[str, Form()],
    }
    app.post(PATH)(edit)
    return app


def serve_fastapi() -> None:
    """Serve with FastAPI on uvicorn, with uvloop and httptools."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    announce(listening.getsockname()[1])
    config = uvicorn.Config(make_app(), loop="uvloop", http="httptools", lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])


def serve_granian() -> None:
    """Serve with FastAPI on granian, with uvloop and one worker process."""
    from granian import Granian
    from granian.constants import Interfaces, Loops

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    written = os.dup(1)
    os.set_inheritable(written, False)
    announce_nothing()

    def announce_when_listening() -> None:
        end = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                os.write(written, f"{port}\n".encode())
                return
            time.sleep(0.02)

    threading.Thread(target=announce_when_listening, daemon=True).start()
    Granian(
        "benchmarks.bench_server:make_app",
        factory=True,
        port=port,
        interface=Interfaces.ASGINL,
        loop=Loops.uvloop,
        backlog=BACKLOG,
        log_access=True,
    ).serve()


def serve_stdlib() -> None:
    """Serve with http.server and a form reader without checks."""
    import json
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            boundary = self.headers["content-type"].partition("boundary=")[2].encode()
            parts = {}
            for part in content.split(b"--" + boundary)[1:-1]:
                head, _, value = part.partition(b"\r\n\r\n")
                parts[head.partition(b'name="')[2].partition(b'"')[0]] = value[:-2]
            body = json.dumps(reply_of(parts[b"image"], parts[b"prompt"].decode())).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    class Server(ThreadingHTTPServer):
        request_queue_size = BACKLOG

    with Server(("127.0.0.1", 0), Handler) as server:
        announce(server.server_port)
        server.serve_forever()


SERVERS: dict[str, Callable[[], None]] = {
    "ovserve": serve_ovserve,
    "fastapi": serve_fastapi,
    "granian": serve_granian,
    "stdlib": serve_stdlib,
}
# The whole server, with a toy engine instead of the model; the toy takes any number of jobs at once.
WHOLE_SERVER = "ovserve+worker"
WHOLE_SERVER_OPTIONS = [
    *("--port", "0", "--model_path", str(BUILTIN_PATH), "--plugin_config", '{"capacity": 64}'),
    *("--max_connections", str(MAX_CONNECTIONS), "--queue_limit", str(MAX_CONNECTIONS)),
]
WHOLE_SERVER_COMMAND = [sys.executable, "-m", "tests.toyserver", *WHOLE_SERVER_OPTIONS]

NAMES = ["ovserve", WHOLE_SERVER, "fastapi", "granian", "stdlib"]


@contextlib.contextmanager
def run_server(name: str) -> Iterator[tuple[int, int]]:
    """Run a server in a fresh process; yield its port and its process id."""
    command = WHOLE_SERVER_COMMAND if name == WHOLE_SERVER else [sys.executable, __file__, "--serve", name]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    try:
        assert server.stdout
        yield int(server.stdout.readline().rpartition(":")[2]), server.pid
    finally:
        server.terminate()
        server.communicate(timeout=STOP_TIMEOUT_S)


# --- load -------------------------------------------------------------------------------------------------------------


def request_bytes(image: bytes) -> bytes:
    """Return one edit as the official Python client sends it."""
    fields = {"model": BUILTIN_NAME, "prompt": "crc", "n": "1", "size": "256x256"}
    body = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    )
    body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="cat.png"\r\n'.encode()
    body += b"Content-Type: image/png\r\n\r\n" + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
        "Accept: application/json\r\nContent-Type: multipart/form-data; boundary=" + BOUNDARY + "\r\n"
        "User-Agent: OpenAI/Python 3.54.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 3.54.0\r\n"
        "X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
        "X-Stainless-Runtime-Version: 3.11.7\r\nAuthorization: Bearer sk-benchmark\r\nX-Stainless-Async: false\r\n"
        f"x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """One connection of a closed loop: it sends the next request when it has the answer."""

    def __init__(self, port: int, request: bytes, expected: Sequence[bytes]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._request = request
        self._expected = expected
        self._rest = memoryview(b"")
        self._answer = b""
        self.started = 0.0

    def begin(self) -> bool:
        """Start to send the next request. Return whether all of it was sent."""
        self.started = time.perf_counter()
        self._rest = memoryview(self._request)
        self._answer = b""
        return self.send_rest()

    def send_rest(self) -> bool:
        """Send what is left of the request. Return whether all of it was sent."""
        try:
            while self._rest:
                self._rest = self._rest[self.socket.send(self._rest) :]
        except BlockingIOError:
            return False
        return True

    def has_answer(self) -> bool:
        """Receive, and return whether the answer is complete.

        Raises:
            RuntimeError: the status is not 200, or the reply is wrong.
        """
        self._answer += self.socket.recv(65536)
        head, found, content = self._answer.partition(b"\r\n\r\n")
        if not found:
            return False
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(content) < length:
            return False
        if not head.startswith(b"HTTP/1.1 200") or not any(known in content for known in self._expected):
            raise RuntimeError(f"wrong answer: {self._answer[:500]!r}")
        return True


def load(port: int, clients: int, seconds: float) -> list[float]:
    """Run a closed loop, and return the latency in seconds of each request that was answered in time."""
    image = PNG_HEAD + random.Random(1).randbytes(IMAGE_BYTES - len(PNG_HEAD))
    request, crc = request_bytes(image), zlib.crc32(image)
    # The reply holds the CRC as a number, or in the last bytes of the toy worker's picture.
    expected = [b"%d," % crc, base64.b64encode(crc.to_bytes(4, "big"))]
    connections = {
        client.socket.fileno(): client for client in (Client(port, request, expected) for _ in range(clients))
    }
    poll = select.epoll()
    end = time.perf_counter() + seconds
    for client in connections.values():
        poll.register(client.socket, select.EPOLLIN if client.begin() else select.EPOLLOUT)
    latencies: list[float] = []
    while time.perf_counter() < end:
        events = poll.poll(ANSWER_TIMEOUT_S)
        if not events:
            raise RuntimeError(f"no answer within {ANSWER_TIMEOUT_S:g} s")
        for descriptor, mask in events:
            client = connections[descriptor]
            if mask & select.EPOLLOUT:
                if client.send_rest():
                    poll.modify(descriptor, select.EPOLLIN)
            elif client.has_answer():
                now = time.perf_counter()
                if now < end:
                    latencies.append(now - client.started)
                if not client.begin():
                    poll.modify(descriptor, select.EPOLLOUT)
    poll.close()
    for client in connections.values():
        client.socket.close()
    return latencies


def cpu_of(server: str, pid: int) -> float:
    """Return the CPU seconds of a server: of its first process, and for granian of its worker too."""
    return sum(cpu_seconds(process) for process in (process_tree(pid) if server == "granian" else [pid]))


def cpu_seconds(pid: int) -> float:
    """Return the user and system time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thin_out(values: Sequence[float]) -> list[float]:
    """Return at most VALUES_KEPT of the values, evenly spread by rank, to keep result files small."""
    step = max(1.0, len(values) / VALUES_KEPT)
    ordered = sorted(values)
    return [ordered[int((place + 0.5) * step)] for place in range(int(len(values) / step))]


def measure_round(result: Result, servers: Sequence[str], clients: Sequence[int], slices: int, seconds: float) -> None:
    """Start all servers in fresh processes, and load them in short slices one after another."""
    requests: Counter[tuple[str, int]] = Counter()
    cpu: Counter[tuple[str, int]] = Counter()
    with contextlib.ExitStack() as stack:
        started = {server: stack.enter_context(run_server(server)) for server in servers}
        for port, _ in started.values():
            load(port, 8, WARM_UP_S)
        for number, _ in itertools.product(clients, range(slices)):
            for server, (port, pid) in started.items():
                before = cpu_of(server, pid)
                latencies = load(port, number, seconds)
                cpu[server, number] += cpu_of(server, pid) - before
                requests[server, number] += len(latencies)
                case = {"server": server, "clients": number}
                result.add("throughput", [len(latencies) / seconds], unit="1/s", better="higher", case=case)
                result.add("latency", thin_out(latencies), case=case)
    for (server, number), count in requests.items():
        result.add("cpu", [cpu[server, number] / max(1, count)], case={"server": server, "clients": number})


def compare(result: Result, servers: Sequence[str], clients: Sequence[int]) -> str:
    """Return lines with ratios to each baseline: throughput, slice by slice, and CPU time per request."""
    lines = []
    for number, server, other in itertools.product(clients, servers, servers):
        if not server.startswith("ovserve") or other.startswith("ovserve"):
            continue
        ours, theirs = (result.find("throughput", server=name, clients=number).values for name in (server, other))
        pairs = [one / two for one, two in zip(ours, theirs, strict=True) if two]
        ours, theirs = (result.find("cpu", server=name, clients=number).values for name in (server, other))
        lines.append(
            f"{server} / {other}, {number} clients: throughput {estimate(pairs)}, CPU of a request "
            f"{ratio(ours, theirs)}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--servers", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument(
        "--clients", nargs="+", type=int, default=[1, 8, 64, 512], help="numbers of clients (1 8 64 512)"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one slice of load (%(default)s)")
    parser.add_argument(
        "--slices", type=int, default=8, help="slices for each server and number of clients in a round (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts of each server (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    if options.serve:
        SERVERS[options.serve]()
        return
    result = Result("server", collect())
    for _ in range(options.rounds):
        measure_round(result, options.servers, options.clients, options.slices, options.seconds)
    print(result.report())
    print(compare(result, options.servers, options.clients))
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
