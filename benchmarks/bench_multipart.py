"""Measure the multipart parser, and the path of an upload from the socket to the spool, against other parsers.

    python benchmarks/bench_multipart.py
    python benchmarks/bench_multipart.py --rounds 7 --sizes 1 10 50 --save

Parser alone: a body in memory, fed in pieces of 64 kB; every event is read and discarded. `find` only searches each
piece for the delimiter: no parser that reads all bytes can be faster.

Socket to spool: another process sends the body over loopback. `memory` receives it into one buffer, which is
overwritten; `fresh segment` and `warm segment` receive it into a spool segment. These three do not parse. `ovserve,
fresh` and `ovserve, warm` are `read_form`, with every check. The others receive pieces of 64 kB and write the file to
the same directory.

Each measurement runs in a fresh process: a warm-up, then some repetitions. The subjects are interleaved within each
round, so that a disturbance of the machine affects all of them. Rates are given by the clock and by the CPU time of the
process; other work on the machine changes the second one far less. Peak memory is the growth of the resident set,
mapped spool pages included; the peak of the heap is measured by tracemalloc in a run that is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

MIB = 1 << 20
PIECE = 64 * 1024
BOUNDARY = "4f1c7d2e9a6b48d3b0c5e8f7a1d2c3b4"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
SMALL_FIELDS = 1000
SMALL_REPEAT = 20  # forms of small fields in one repetition, since a single one takes only a millisecond
TIMEOUT_S = 120.0


def upload_body(size: int) -> bytes:
    """Return a form with a prompt and a file of random bytes, as the official Python client sends it."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red hat\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="cat.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    return head.encode() + random.Random(1).randbytes(size) + f"\r\n--{BOUNDARY}--\r\n".encode()


def fields_body() -> bytes:
    """Return a form with SMALL_FIELDS text fields of about ten bytes."""
    fields = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="field{k}"\r\n\r\nvalue {k}\r\n'
        for k in range(SMALL_FIELDS)
    )
    return "".join(fields).encode() + f"--{BOUNDARY}--\r\n".encode()


# --- parsers: pieces to the number of events --------------------------------------------------------------------------


def parse_find(pieces: list[Any]) -> int:
    """Search each piece for the delimiter, without parsing. No parser can be faster."""
    delimiter = f"\r\n--{BOUNDARY}".encode()
    return sum(piece.find(delimiter) >= 0 for piece in pieces)


def parse_ovserve(pieces: list[Any]) -> int:
    """Parse with ovserve's parser."""
    from ovserve.front.forms.multipart import MultipartParser

    parser = MultipartParser(BOUNDARY, max_parts=10 * SMALL_FIELDS, max_part_head_bytes=8192)
    count = 0
    for piece in pieces:
        for _ in parser.feed(piece):
            count += 1
    parser.finish()
    return count


def parse_multipart_push(pieces: list[Any]) -> int:
    """Parse with the push parser of `multipart`."""
    import multipart

    count = 0
    with multipart.PushMultipartParser(BOUNDARY) as parser:
        for piece in pieces:
            for _ in parser.parse(piece):
                count += 1
    return count


def parse_multipart_buffered(pieces: list[Any]) -> int:
    """Parse with the buffered parser of `multipart`, with limits so high that every part is kept in memory."""
    import multipart

    stream = io.BytesIO(b"".join(pieces))
    limit = 1 << 40
    parser = multipart.MultipartParser(
        stream, BOUNDARY, part_limit=10 * SMALL_FIELDS, memory_limit=limit, spool_limit=limit
    )
    return sum(1 for part in parser if part.size >= 0)


def parse_python_multipart(pieces: list[Any]) -> int:
    """Parse with the callback parser of `python-multipart`, as Starlette uses it."""
    import python_multipart

    count = 0

    def on_data(_: bytes, __: int, ___: int) -> None:
        nonlocal count
        count += 1

    def on_event() -> None:
        nonlocal count
        count += 1

    callbacks: Any = {
        "on_part_begin": on_event,
        "on_part_data": on_data,
        "on_part_end": on_event,
        "on_header_field": on_data,
        "on_header_value": on_data,
        "on_header_end": on_event,
        "on_headers_finished": on_event,
    }
    parser = python_multipart.MultipartParser(BOUNDARY, callbacks)
    for piece in pieces:
        parser.write(piece)
    parser.finalize()
    return count


def parse_werkzeug(pieces: list[Any]) -> int:
    """Parse with Werkzeug's sans-I/O decoder."""
    from werkzeug.sansio.multipart import Epilogue, MultipartDecoder, NeedData

    decoder = MultipartDecoder(BOUNDARY.encode())
    count = 0
    for piece in [*pieces, None]:
        decoder.receive_data(piece)
        while not isinstance(decoder.next_event(), NeedData | Epilogue):
            count += 1
    return count


PARSERS: dict[str, Callable[[list[Any]], int]] = {
    "find": parse_find,
    "ovserve": parse_ovserve,
    "ovserve, views": parse_ovserve,
    "multipart, push": parse_multipart_push,
    "multipart, buffered": parse_multipart_buffered,
    "python-multipart": parse_python_multipart,
    "werkzeug": parse_werkzeug,
}

# --- from the socket to the spool -------------------------------------------------------------------------------------


class Receiver:
    """A connection that delivers a body of known length, and the directory to store its file in."""

    def __init__(self, connection: socket.socket, size: int, folder: Path) -> None:
        self.connection = connection
        self.size = size
        self.folder = folder

    def pieces(self) -> Iterator[bytes]:
        """Yield the body in pieces of at most PIECE bytes, as a server passes it to a parser."""
        left = self.size
        while left:
            piece = self.connection.recv(min(PIECE, left))
            left -= len(piece)
            yield piece


def receive_memory(receiver: Receiver, _: Any) -> None:
    """Receive into one buffer, which is overwritten."""
    view = memoryview(bytearray(256 * 1024))
    left = receiver.size
    while left:
        left -= receiver.connection.recv_into(view[:left] if left < len(view) else view)


def receive_segment(receiver: Receiver, spool: Any) -> None:
    """Receive into a segment that grows as in `read_form`, without parsing and checks."""
    segment = spool.create_for_upload(receiver.size)
    filled = 0
    while filled < receiver.size:
        if filled >= segment.reserved:
            segment.reserve(min(receiver.size, filled + min(max(filled, 256 * 1024), MIB)))
        stop = min(segment.reserved, receiver.size, filled + MIB)
        filled += receiver.connection.recv_into(segment.view[filled:stop], 0, socket.MSG_WAITALL)
    segment.release()


def receive_ovserve(receiver: Receiver, spool: Any) -> None:
    """Receive as the server does, from its transport to a form with an upload."""
    from ovserve.front.body import Body
    from ovserve.front.forms.form import read_form
    from ovserve.front.transport import Transport

    settings, head = settings_and_head(receiver.size)
    body = Body(Transport(receiver.connection, settings.write_timeout_s), head, settings)
    form = read_form(body, CONTENT_TYPE, spool, settings)
    assert form.uploads[0].size >= receiver.size - 1000
    form.release()


@functools.cache
def settings_and_head(size: int) -> tuple[Any, Any]:
    """Return default settings, and the head of a request with a body of this size."""
    from ovserve.front.http1.head import HeadParser
    from ovserve.settings.options import Settings

    settings = Settings()
    text = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {size}\r\n\r\n"
    return settings, HeadParser(settings).parse(text.encode())


def receive_multipart_push(receiver: Receiver, _: Any) -> None:
    """Parse with `multipart`'s push parser and write file data as it arrives."""
    import multipart

    with (
        tempfile.TemporaryFile(dir=receiver.folder, buffering=0) as file,
        multipart.PushMultipartParser(BOUNDARY, receiver.size) as parser,
    ):
        segment = None
        for piece in receiver.pieces():
            for event in parser.parse(piece):
                if isinstance(event, multipart.MultipartSegment):
                    segment = event
                elif event and segment and segment.filename:
                    file.write(event)


def receive_python_multipart(receiver: Receiver, _: Any) -> None:
    """Parse with `python-multipart` and write file data as it arrives."""
    import python_multipart

    with tempfile.TemporaryFile(dir=receiver.folder, buffering=0) as file:
        is_file = False

        def on_value(data: bytes, start: int, end: int) -> None:
            nonlocal is_file
            is_file = b"filename=" in data[start:end] or (is_file and b"name=" not in data[start:end])

        def on_data(data: bytes, start: int, end: int) -> None:
            if is_file:
                file.write(memoryview(data)[start:end])

        callbacks: Any = {"on_header_value": on_value, "on_part_data": on_data}
        parser = python_multipart.MultipartParser(BOUNDARY, callbacks)
        for piece in receiver.pieces():
            parser.write(piece)
        parser.finalize()


def receive_werkzeug(receiver: Receiver, _: Any) -> None:
    """Parse with Werkzeug's form parser over a stream, with its files in the same directory."""
    from werkzeug.formparser import MultiPartParser

    def open_file(*_: Any, **__: Any) -> Any:
        return tempfile.TemporaryFile(dir=receiver.folder, buffering=0)

    with receiver.connection.makefile("rb", buffering=0) as raw:
        parser = MultiPartParser(stream_factory=open_file)
        stream: Any = _Limited(raw, receiver.size)
        _, files = parser.parse(stream, BOUNDARY.encode(), receiver.size)
    for file in files.values():
        file.close()


class _Limited:
    """A stream that ends at the end of the body."""

    def __init__(self, raw: Any, left: int) -> None:
        self.raw = raw
        self.left = left

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes; empty at the end of the body."""
        data: bytes = self.raw.read(min(size, self.left)) if self.left else b""
        self.left -= len(data)
        return data


RECEIVERS: dict[str, tuple[Callable[[Receiver, Any], None], int]] = {
    "memory": (receive_memory, 0),
    "fresh segment": (receive_segment, 0),
    "ovserve, fresh": (receive_ovserve, 0),
    "warm segment": (receive_segment, 64 * MIB),
    "ovserve, warm": (receive_ovserve, 64 * MIB),
    "multipart, push": (receive_multipart_push, 0),
    "python-multipart": (receive_python_multipart, 0),
    "werkzeug": (receive_werkzeug, 0),
}

# --- one measurement, in a fresh process ------------------------------------------------------------------------------


def resident_bytes(field: str) -> int:
    """Return a memory figure of this process: VmRSS (current) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def repeat(work: Callable[[], None], repetitions: int) -> dict[str, Any]:
    """Warm up, then return the time of each repetition by the clock and by CPU time, and the peaks of memory."""
    work()
    tracemalloc.start()
    work()
    heap = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds, cpu = [], []
    reset_peak()
    before = resident_bytes("VmRSS")
    for _ in range(repetitions):
        began, began_cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return {"seconds": seconds, "cpu": cpu, "peak": max(0, resident_bytes("VmHWM") - before), "heap": heap}


def measure_parser(name: str, case: str, repetitions: int) -> dict[str, Any]:
    """Measure one parser on one body."""
    body = fields_body() if case == "fields" else upload_body(int(case) * MIB)
    pieces: list[Any] = [body[at : at + PIECE] for at in range(0, len(body), PIECE)]
    if name == "ovserve, views":
        pieces = [memoryview(piece) for piece in pieces]
    parse = PARSERS[name]
    times = SMALL_REPEAT if case == "fields" else 1

    def work() -> None:
        for _ in range(times):
            parse(pieces)

    return {**repeat(work, repetitions), "bytes": len(body) * times}


def measure_receiver(name: str, case: str, repetitions: int) -> dict[str, Any]:
    """Measure one receiver, for an upload of one size."""
    from ovserve.wire.local.spool import Spool, default_directory

    receive, warm_bytes = RECEIVERS[name]
    size = len(upload_body(int(case) * MIB))
    with tempfile.TemporaryDirectory(dir=default_directory()) as directory, body_sender(int(case)) as listening:
        spool = Spool(Path(directory), 1 << 32, warm_bytes=warm_bytes)

        def work() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(TIMEOUT_S)
                receive(Receiver(connection, size, Path(directory)), spool)

        measured = repeat(work, repetitions)
        spool.close()
    return {**measured, "bytes": size}


@contextlib.contextmanager
def body_sender(mebibytes: int) -> Iterator[socket.socket]:
    """Run a process that connects repeatedly and sends the body each time; yield the listening socket."""
    listening = socket.create_server(("127.0.0.1", 0))
    sender = os.fork()
    if not sender:
        with contextlib.suppress(OSError):
            address = listening.getsockname()
            listening.close()
            body = memoryview(upload_body(mebibytes * MIB))
            while True:
                with socket.create_connection(address, TIMEOUT_S) as connection:
                    connection.sendall(body)
                    connection.recv(1)  # wait until the receiver has closed
        os._exit(0)
    try:
        listening.settimeout(TIMEOUT_S)
        yield listening
    finally:
        os.kill(sender, 9)
        os.waitpid(sender, 0)
        listening.close()


MEASURES = {"parser": measure_parser, "socket": measure_receiver}


def measure_in_process(path: str, name: str, case: str, repetitions: int) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", path, name, case, str(repetitions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 10, 50], help="sizes of uploads in MiB")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes for each subject (%(default)s)")
    parser.add_argument(
        "--repetitions", type=int, default=3, help="repetitions in each process, after a warm-up (%(default)s)"
    )
    parser.add_argument("--only", choices=MEASURES, help="measure only this path")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    if options.measure:
        path, name, case, repetitions = options.measure
        print(json.dumps(MEASURES[path](name, case, int(repetitions))))
        return
    from benchmarks.metadata import collect
    from benchmarks.results import Result

    result = Result("multipart", collect())
    sizes = [str(size) for size in options.sizes]
    plan = [("parser", name, case) for case in [*sizes, "fields"] for name in PARSERS]
    plan += [("socket", name, case) for case in sizes for name in RECEIVERS]
    for _ in range(options.rounds):
        for path, name, case in plan:
            if options.only in (None, path):
                measured = measure_in_process(path, name, case, options.repetitions)
                labels = {"path": path, "subject": name, "body": case}
                for figure, times in (("throughput", measured["seconds"]), ("cpu", measured["cpu"])):
                    rates = [measured["bytes"] / seconds for seconds in times]
                    result.add(figure, rates, unit="B/s", better="higher", case=labels)
                result.add("peak", [measured["peak"]], unit="bytes", case=labels)
                result.add("heap", [measured["heap"]], unit="bytes", case=labels)
    print(result.report())
    print_aims(result, sizes)
    if options.save:
        print(result.save())


AIMS = (
    ("parser", "ovserve", "multipart, push", "uploads", 1.0),
    ("parser", "ovserve", "python-multipart", "uploads", 3.0),
    ("parser", "ovserve", "werkzeug", "uploads", 3.0),
    ("parser", "ovserve", "multipart, push", "fields", 1.5),
    ("parser", "ovserve", "python-multipart", "fields", 3.0),
    ("parser", "ovserve", "werkzeug", "fields", 3.0),
    ("parser", "ovserve", "find", "uploads", 0.0),
    ("socket", "ovserve, fresh", "fresh segment", "uploads", 0.85),
    ("socket", "ovserve, warm", "fresh segment", "uploads", 0.85),
    ("socket", "ovserve, warm", "warm segment", "uploads", 0.0),
    ("socket", "ovserve, warm", "memory", "uploads", 0.0),
    ("socket", "ovserve, warm", "multipart, push", "uploads", 0.0),
)


def print_aims(result: Any, sizes: list[str]) -> None:
    """Print the ratios in AIMS, by the clock and by CPU time, with the aim where there is one."""
    from benchmarks.stats import ratio

    for path, ours, theirs, body, aim in AIMS:
        for case in sizes if body == "uploads" else [body]:
            try:
                ratios = [
                    ratio(
                        result.find(figure, path=path, subject=ours, body=case).values,
                        result.find(figure, path=path, subject=theirs, body=case).values,
                    )
                    for figure in ("throughput", "cpu")
                ]
            except KeyError:
                continue
            verdict = f"  (aim {aim})" if aim else ""
            print(f"{path}: {ours} / {theirs}, {case}: {ratios[0]} by the clock, {ratios[1]} by CPU time{verdict}")


if __name__ == "__main__":
    main()
