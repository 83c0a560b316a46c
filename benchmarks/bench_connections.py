"""Measure memory and threads of the front end for each connection, idle and active, against other servers.

    python benchmarks/bench_connections.py
    python benchmarks/bench_connections.py --connections 0 64 512 1024 --rounds 3 --save

The servers are those of bench_server. Each count of connections is measured in a fresh process:

idle      each connection has had an answer, and waits for the next request
active    each connection has sent the head and half of the body of an edit with an image of 64 kB

Memory is the proportional set size of the server's processes, after a second in which it did not grow. Memory of one
connection is the slope between no connection and the largest number.
"""

from __future__ import annotations

import argparse
import random
import resource
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_server import (
    ANSWER_TIMEOUT_S,
    IMAGE_BYTES,
    NAMES,
    PNG_HEAD,
    WARM_UP_S,
    WHOLE_SERVER,
    load,
    request_bytes,
    run_server,
)
from benchmarks.metadata import collect
from benchmarks.results import Result
from benchmarks.servers import memory_of_tree, process_tree

STATES = ("idle", "active")
SETTLED_BYTES = 64 * 1024  # memory that changes by less within a second is settled
SETTLE_TIMEOUT_S = 15.0
SERVERS = [name for name in NAMES if name != WHOLE_SERVER]


def connect(port: int, count: int, state: str) -> list[socket.socket]:
    """Return connections in a state."""
    request = request_bytes(PNG_HEAD + random.Random(1).randbytes(IMAGE_BYTES - len(PNG_HEAD)))
    sent = request if state == "idle" else request[: len(request) // 2]
    connections = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S)
        connection.sendall(sent)
        if state == "idle":
            _read_answer(connection)
        connections.append(connection)
    return connections


def _read_answer(connection: socket.socket) -> None:
    answer = b""
    while True:
        received = connection.recv(65536)
        if not received:
            raise RuntimeError(f"the connection was closed after {answer[:200]!r}")
        answer += received
        head, found, content = answer.partition(b"\r\n\r\n")
        if found and len(content) >= int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return


def settled_memory(pid: int) -> int:
    """Return the memory of a process when it has stopped growing."""
    end = time.monotonic() + SETTLE_TIMEOUT_S
    before = memory_of_tree(pid)
    while time.monotonic() < end:
        time.sleep(1.0)
        now = memory_of_tree(pid)
        if abs(now - before) < SETTLED_BYTES:
            return now
        before = now
    return before


def threads_of(pid: int) -> int:
    """Return the number of threads of a process and its descendants."""
    return sum(len(list(Path(f"/proc/{process}/task").iterdir())) for process in process_tree(pid))


def measure(result: Result, server: str, state: str, counts: Sequence[int]) -> None:
    """Measure one server with each number of connections, in a fresh process for each."""
    memory = {}
    for count in counts:
        case = {"server": server, "state": state, "connections": count}
        with run_server(server) as (port, pid):
            load(port, 8, WARM_UP_S)
            connections = connect(port, count, state)
            memory[count] = settled_memory(pid)
            result.add("memory", [memory[count]], unit="bytes", case=case)
            result.add("threads", [threads_of(pid)], unit="", case=case)
            for connection in connections:
                connection.close()
    least, most = min(counts), max(counts)
    if most > least:
        slope = (memory[most] - memory[least]) / (most - least)
        result.add("memory of a connection", [slope], unit="bytes", case={"server": server, "state": state})


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS, help="default: all")
    parser.add_argument("--connections", nargs="+", type=int, default=[0, 64, 512, 1024], help="(0 64 512 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * max(options.connections) + 256
    if soft < wanted:  # inherited by the servers
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    result = Result("connections", collect())
    for _ in range(options.rounds):
        for state in STATES:
            for server in options.servers:
                measure(result, server, state, options.connections)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
