"""Measure round trips of messages and bytes between two processes: our link against the standard library.

    python benchmarks/bench_ipc.py
    python benchmarks/bench_ipc.py --rounds 5 --save

Each transport has its own child process, started again in each round. The child answers a message with a message, and
bytes with their length after it has read every page of them. The transports are interleaved within each round.

link      a JSON line through a private pipe; bytes in a spool segment
queue     multiprocessing.Queue, with its feeder thread and pickle, for messages and bytes
pipe      multiprocessing.Pipe and pickle, for messages and bytes: the smallest overhead in the standard library
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovserve.errors import LinkClosed
from ovserve.wire.blobs import Blob
from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.local.pipes import PipeWorkerLink, open_link
from ovserve.wire.local.spool import Spool, default_directory
from ovserve.wire.messages import Done, Message, Need, Run

MESSAGE = Run("job_0123456789abcdef0123456789abcdef", "/dev/shm/ovserve-spool-abcdefgh/0123456789abcdef01234567", 599.5)
ANSWER = Done("job_0123456789abcdef0123456789abcdef", 1.5, 120.25, 3.75)
SIZES = (1_000, 64 * 1024, 1 << 20, 10 << 20)
PAGE = os.sysconf("SC_PAGE_SIZE")
REPEATS = {0: 2000, 1_000: 1000, 64 * 1024: 500, 1 << 20: 100, 10 << 20: 20}
WARM_UP = 0.1
CONTEXT = multiprocessing.get_context("spawn")


def read_pages(data: bytes | memoryview) -> int:
    """Read one byte of every page, as a decoder would, and return the length."""
    return len(data) + 0 * sum(data[::PAGE])


# --- child processes --------------------------------------------------------------------------------------------------


def answer_link(end: PipeWorkerLink, blobs: SpoolBlobs) -> None:
    """Answer each message with a message; if it names a segment, read the segment and answer with its length."""
    try:
        while True:
            message = end.receive()
            if not isinstance(message, Run):
                return
            if message.timeout_s > 0:
                end.send(ANSWER)
                continue
            with blobs.open(Blob(message.request, 0, int(-message.timeout_s))) as view:
                end.send(Need(message.job, 0, read_pages(view)))
    except LinkClosed:
        return


def answer_queue(commands: Queue[Any], reports: Queue[Any]) -> None:
    """Answer as `answer_link` does, over two queues."""
    while (message := commands.get()) is not None:
        reports.put(ANSWER if isinstance(message, Run) else Need("", 0, read_pages(message)))


def answer_pipe(commands: Connection, reports: Connection) -> None:
    """Answer as `answer_link` does, over two pipes."""
    while (message := commands.recv()) is not None:
        reports.send(ANSWER if isinstance(message, Run) else Need("", 0, read_pages(message)))


# --- transports: each yields a function that makes one round trip of a message (no data) or of bytes ------------------


@contextmanager
def over_link() -> Iterator[Callable[[bytes], None]]:
    """Open a link of ovserve, with a spool for bytes."""
    link, end = open_link(CONTEXT, "bench", 0, 0)
    with tempfile.TemporaryDirectory(dir=default_directory()) as directory:
        spool = Spool(Path(directory), 1 << 30)
        child = CONTEXT.Process(target=answer_link, args=(end, spool.worker_blobs()))
        child.start()
        end.close()

        def receive() -> Message:
            while True:
                select.select([link.readiness], [], [])
                if found := link.receive():
                    return found[0]

        def round_trip(data: bytes) -> None:
            if not data:
                link.send(MESSAGE)
                receive()
                return
            segment = spool.put(data)
            link.send(Run(MESSAGE.job, segment.id, -float(len(data))))
            answer = receive()
            segment.release()
            if not isinstance(answer, Need) or answer.size != len(data):
                raise RuntimeError(f"wrong answer: {answer}")

        yield round_trip
        link.close()
        child.join()
        spool.close()


@contextmanager
def over_queue() -> Iterator[Callable[[bytes], None]]:
    """Open a pair of multiprocessing queues."""
    commands: Queue[Any] = CONTEXT.Queue()
    reports: Queue[Any] = CONTEXT.Queue()
    child = CONTEXT.Process(target=answer_queue, args=(commands, reports))
    child.start()

    def round_trip(data: bytes) -> None:
        commands.put(data or MESSAGE)
        answer = reports.get()
        if data and answer.size != len(data):
            raise RuntimeError(f"wrong answer: {answer}")

    yield round_trip
    commands.put(None)
    child.join()


@contextmanager
def over_pipe() -> Iterator[Callable[[bytes], None]]:
    """Open a pair of multiprocessing pipes."""
    (child_commands, commands), (reports, child_reports) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=answer_pipe, args=(child_commands, child_reports))
    child.start()
    child_commands.close()
    child_reports.close()

    def round_trip(data: bytes) -> None:
        commands.send(data or MESSAGE)
        answer = reports.recv()
        if data and answer.size != len(data):
            raise RuntimeError(f"wrong answer: {answer}")

    yield round_trip
    commands.send(None)
    child.join()


TRANSPORTS = {"link": over_link, "queue": over_queue, "pipe": over_pipe}


def measure(transport: str, size: int) -> list[float]:
    """Return the seconds of each round trip, with a fresh child process."""
    data = os.urandom(size)
    times = []
    with TRANSPORTS[transport]() as round_trip:
        count = REPEATS[size]
        for number in range(-int(count * WARM_UP) - 1, count):
            started = time.perf_counter()
            round_trip(data)
            if number >= 0:
                times.append(time.perf_counter() - started)
    return times


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts of each child process (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    from benchmarks.metadata import collect
    from benchmarks.results import Result
    from benchmarks.stats import ratio

    result = Result("ipc", collect())
    for _ in range(options.rounds):
        for size in (0, *SIZES):
            for transport in TRANSPORTS:
                # "way" is the name of this key in the committed result files.
                result.add("round trip", measure(transport, size), case={"way": transport, "bytes": size})
    print(result.report())
    for size in (0, *SIZES):
        ours = result.find("round trip", way="link", bytes=size).values
        for transport in ("queue", "pipe"):
            theirs = result.find("round trip", way=transport, bytes=size).values
            print(f"round trip link / {transport}, {size or 'message'}: {ratio(ours, theirs)}")
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
