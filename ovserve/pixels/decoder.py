"""Decodes image files for a worker: the harmless ones here, all others in a decoding process that can be killed alone.

    worker                                                     decoding process
    inspect(file): counts ──over a limit──▶ ImageError
    baseline, small ──▶ decode_image here
    else: memory files for the encoded bytes and the pixels
          ──JSON, 2 descriptors──▶                             limit CPU time and memory, decode, write the pixels
          ◀──JSON: shape──
          copy the pixels, close both files

- The process is a child of the worker, spawned when the first file needs it and kept. It ends with the worker: its
  socket closes, and the kernel kills it when the thread that spawned it ends. So only threads that live as long as the
  worker may call `decode`.
- It decodes one file at a time. CPU time and memory are limited for each file, by the number of pixels in its header.
  A file that exceeds a limit or crashes the decoder costs its request an error, and the process is replaced. One that
  is killed by SIGKILL, as by the kernel when memory is short, is not the file's fault: the file is tried once more.
- A process that dies before it has decoded its own samples shows a broken installation: after START_ATTEMPTS of them
  every request gets a server error, and a new attempt is made only after a backoff.
- What its native libraries write to standard error goes into one log line for each file.

Why not every file is decoded there: writing the encoded bytes, waking the process and copying the pixels takes 0.6 ms
for a picture of 512x512 and 3 ms for one of 1024x1024 (median of 200, two cores), against a budget of 0.3 ms.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovserve.errors import ImageError, InternalError
from ovserve.logs import LogLimit, current_form, fields
from ovserve.pixels.counts.inspect import FileFacts, inspect
from ovserve.pixels.images import Limits, Pixels, check_size, decode_image, extract_colour_profile
from ovserve.wire.local.processes import describe_exit, raise_oom_score

__all__ = ["DecodeLimits", "DecodedImage", "Decoder", "decode_here"]

BASELINE_PIXELS = 4_000_000  # a baseline file up to this size is decoded in the calling thread: 20 to 60 ms
# A file gets its part of decode_cpu_limit_s: 0.05 of it up to one megapixel, 0.02 more for each further one, so all of
# it from 49 megapixels. A photograph needs 5 to 50 ms of CPU time per megapixel.
CPU_SHARE, CPU_SHARE_PER_MEGAPIXEL = 0.05, 0.02
# Pillow, numpy and libwebp hold up to five copies of 4 bytes per pixel (measured: 17 bytes for WebP, 10 to 13 for other
# formats); a progressive JPEG has 6 bytes of coefficients and two copies.
MEMORY_BYTES, MEMORY_BYTES_PER_PIXEL = 32 << 20, 20
PROFILE_BYTES = 1 << 20  # of a colour profile, see `extract_colour_profile`
START_ATTEMPTS = 3
BACKOFF_S = (1.0, 60.0)  # after START_ATTEMPTS; doubled up to the second
LOGGED_BYTES = 1000  # of a file's output on standard error
_READ_BYTES = 65536
_MIN_START_S = 5.0  # to start Python and import the decoders, however short the limit for a file is
# The child gets the worker's module path and no more of its state than this.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from ovserve.pixels.decoder_process import main; main({fd}, {parent}, {log})"
)
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER": "16",  # as MAX_JPEG_PASSES; libtiff's own default is 100
}

# (socket, the worker's process id, (descriptor, format) of the log) to the command line of a decoding process.
Command = Callable[[int, int, tuple[int, str]], Sequence[str]]

log = logging.getLogger(__name__)

_FAILED_START = "the decoding process does not start"


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Limits of decoding one file; the options with the same names.

    Attributes:
        cpu_s: CPU time for the largest file.
        memory_bytes: memory for the largest file.
        wall_s: time until a process that has not replied is killed, though it has used less CPU time.
    """

    cpu_s: float
    memory_bytes: int
    wall_s: float

    def cpu_of(self, pixels: int) -> float:
        """Return the CPU time for a file of this many pixels, in seconds."""
        return self.cpu_s * min(1.0, CPU_SHARE + CPU_SHARE_PER_MEGAPIXEL * max(0, pixels - 1_000_000) / 1_000_000)

    def memory_of(self, pixels: int, encoded_bytes: int) -> int:
        """Return the memory for a file of this many pixels and bytes."""
        return min(self.memory_bytes, MEMORY_BYTES + MEMORY_BYTES_PER_PIXEL * pixels + encoded_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """Decoded pixels, as `decode_image` returns them, and the colour profile, as `extract_colour_profile` does."""

    pixels: Pixels
    colour_profile: bytes


def decode_here(data: memoryview, name: str, limits: Limits, *, needs_profile: bool = True) -> DecodedImage:
    """Decode a file in this process, without limits of time and memory."""
    pixels = decode_image(data, name, limits)
    return DecodedImage(pixels, extract_colour_profile(data) if needs_profile else b"")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _File:
    """One file for the decoding process, and its limits."""

    encoded: memoryview
    name: str
    limits: Limits
    facts: FileFacts
    needs_profile: bool
    job: str
    cpu_s: float
    memory_bytes: int

    @property
    def pixels(self) -> int:
        return self.facts.width * self.facts.height

    @property
    def size(self) -> str:
        return f"{self.facts.width}x{self.facts.height}"

    def request(self) -> dict[str, Any]:
        """Return the message to the decoding process."""
        return {
            "name": self.name,
            "pixels": self.limits.pixels,
            "side_px": self.limits.side_px,
            "size": len(self.encoded),
            "profile": self.needs_profile,
            "cpu_s": self.cpu_s,
            "memory_bytes": self.memory_bytes,
        }

    def rejected(self, reason: str) -> ImageError:
        """Return the error for a file that exceeds a limit or crashes the decoder."""
        advice = f"Save the {self.facts.format} file again as PNG or as baseline JPEG."
        return ImageError(f"{self.name}: {reason}. {advice}", param=self.name)


class _Died(Exception):
    """The decoding process has ended; `exitcode` as in multiprocessing."""

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(describe_exit(exitcode))
        self.exitcode = exitcode


class Decoder:
    """Decodes the image files of one worker. Thread-safe; the decoding process takes one file at a time.

    Args:
        decode_limits: limits for each file.
        command: returns the command line of a decoding process, from the descriptor of its socket, the worker's process
            id, and the descriptor and the format of the log.
        clock: a monotonic clock.
    """

    def __init__(
        self,
        decode_limits: DecodeLimits,
        *,
        command: Command | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = decode_limits
        self._command = command or _command
        self._clock = clock
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._log_limit = LogLimit("messages about image files")
        self._failed_starts = 0
        self._start_again_at = 0.0

    @property
    def pid(self) -> int:
        """The decoding process's id; 0 while there is none."""
        child = self._child
        return child.pid if child else 0

    def decode(
        self, data: memoryview, name: str, limits: Limits, *, needs_profile: bool = True, job: str = ""
    ) -> DecodedImage:
        """Decode the first frame of an image file.

        Args:
            data: the file.
            name: the field to name in an error.
            limits: the largest accepted image.
            needs_profile: read the colour profile too.
            job: the job's id, for the log.

        Raises:
            ImageError: as `decode_image`; a count, CPU time or memory is over its limit; the decoder died.
            InternalError: no decoding process can be started.
        """
        facts = inspect(data, name)
        check_size(facts.width, facts.height, name, limits)
        pixels = facts.width * facts.height
        # Released on errors too, whose traceback would keep it: the caller could not close the file's mapping.
        with data[: facts.end] as encoded:
            if facts.is_baseline and pixels <= BASELINE_PIXELS:
                return decode_here(encoded, name, limits, needs_profile=needs_profile)
            file = _File(
                encoded=encoded,
                name=name,
                limits=limits,
                facts=facts,
                needs_profile=needs_profile,
                job=job,
                cpu_s=self._limits.cpu_of(pixels),
                memory_bytes=self._limits.memory_of(pixels, len(encoded)),
            )
            with self._lock:
                return self._decode_in_child(file)

    def close(self) -> None:
        """End the decoding process. Idempotent."""
        with self._lock:
            self._replace()
        self._log_limit.stop()

    def _decode_in_child(self, file: _File) -> DecodedImage:
        for attempt in (1, 2):
            child = self._running_child()
            descriptors: list[int] = []
            try:
                descriptors.append(source := _memory_file("encoded", len(file.encoded), file.encoded))
                descriptors.append(target := _memory_file("pixels", 4 * file.pixels + PROFILE_BYTES))
                reply = child.exchange(file.request(), (source, target), self._limits.wall_s)
                if "shape" in reply:
                    return _read_result(reply, target, file.facts)
            except (_Died, ValueError) as error:
                self._replace()
                exitcode = error.exitcode if isinstance(error, _Died) else None
                values = {"job": file.job, "field": file.name, "size": file.size, "why": error}
                self._log_limit.log(log, logging.WARNING, "decoding process failed", **values)
                if exitcode == -signal.SIGKILL and attempt == 1:
                    continue
                if exitcode in (-signal.SIGPROF, -signal.SIGXCPU):
                    reason = f"decoding {file.size} pixels takes more than {file.cpu_s:.2f} s of CPU time"
                else:
                    reason = f"the decoder failed on this file ({error})"
                raise file.rejected(reason) from None
            except TimeoutError:
                self._replace()
                raise file.rejected(f"decoding did not end within {self._limits.wall_s:g} s") from None
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
                child.log_output(self._log_limit, file.job, file.name)
            if "memory" in reply:
                raise file.rejected(f"decoding {file.size} pixels takes more than {file.memory_bytes} bytes of memory")
            raise ImageError(str(reply.get("error", "")), param=file.name)
        raise AssertionError("the second attempt returns or raises")

    def _running_child(self) -> _Child:
        """Return a decoding process that is ready. Raises InternalError when none starts."""
        if self._child is not None and self._child.is_running():
            return self._child
        self._replace()
        if self._failed_starts >= START_ATTEMPTS and self._clock() < self._start_again_at:
            raise InternalError(_FAILED_START)
        while True:
            try:
                self._child = _Child(self._command)
                self._child.wait_until_ready(max(self._limits.wall_s, _MIN_START_S))
            except (_Died, OSError, ValueError) as error:  # TimeoutError is an OSError
                if self._child is not None:
                    self._child.log_output(self._log_limit, "", "")
                self._replace()
                self._failed_starts += 1
                log.log(logging.ERROR, _FAILED_START, extra=fields(attempt=self._failed_starts, why=str(error)))
                wait_s = min(BACKOFF_S[1], BACKOFF_S[0] * 2.0 ** max(0, self._failed_starts - START_ATTEMPTS))
                self._start_again_at = self._clock() + wait_s
                # After a timeout: further attempts would keep the caller past its worker's hang limit.
                if self._failed_starts >= START_ATTEMPTS or isinstance(error, TimeoutError):
                    raise InternalError(_FAILED_START) from None
            else:
                self._failed_starts = 0
                return self._child

    def _replace(self) -> None:
        """End the process; the next file that needs one starts another."""
        if self._child is not None:
            self._child.close()
            self._child = None


def _command(descriptor: int, parent: int, log_to: tuple[int, str]) -> Sequence[str]:
    path = [entry or os.getcwd() for entry in sys.path]
    program = _PROGRAM.format(path=path, fd=descriptor, parent=parent, log=log_to)
    return [sys.executable, "-c", program]


class _Child:
    """One decoding process, its socket and its standard error."""

    def __init__(self, command: Command) -> None:
        self._link, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output, self._output_bytes, self._output_lines = b"", 0, 0
        log_descriptor = os.dup(_log_descriptor())  # its own standard error is read here, file by file
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command(end.fileno(), os.getpid(), (log_descriptor, current_form())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(end.fileno(), log_descriptor),
                env=os.environ | _ENVIRONMENT,
            )
        except OSError:
            self._link.close()
            raise
        finally:
            end.close()
            os.close(log_descriptor)
        self._errors = -1 if self._process.stderr is None else self._process.stderr.fileno()
        os.set_blocking(self._errors, False)
        self.pid = self._process.pid
        raise_oom_score(self.pid)

    def is_running(self) -> bool:
        """Return whether the process runs; reap it when it has exited."""
        return self._process.poll() is None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the process has decoded its samples. Raises _Died, TimeoutError or ValueError."""
        self._receive(timeout_s)

    def exchange(self, request: dict[str, Any], descriptors: Sequence[int], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its reply, reading standard error meanwhile.

        Raises:
            _Died: the process has exited.
            TimeoutError: no reply came in time.
            ValueError: the reply is not one.
        """
        try:
            socket.send_fds(self._link, [json.dumps(request).encode()], list(descriptors))
        except OSError:
            raise _Died(self._wait()) from None
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        poll = select.poll()
        for descriptor in (self._link.fileno(), self._errors):
            poll.register(descriptor, select.POLLIN)
        while True:
            left = end - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000))
            if self._errors in ready and not self._read_output():
                poll.unregister(self._errors)
            if self._link.fileno() in ready:
                break
            if left <= 0:
                raise TimeoutError("no reply")
        try:
            message = self._link.recv(_READ_BYTES)
        except OSError:
            message = b""
        if not message:
            raise _Died(self._wait())
        self._read_output()
        reply = json.loads(message)
        if not isinstance(reply, dict):
            raise ValueError("invalid reply")
        return reply

    def _wait(self) -> int | None:
        """Return the exit code of a process whose socket has closed."""
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def _read_output(self) -> bool:
        """Read standard error until it is empty or enough for now; keep its start. Return False at its end."""
        if self._errors < 0:
            return False
        try:
            text = os.read(self._errors, _READ_BYTES)
        except BlockingIOError:
            return True
        self._output_bytes += len(text)
        self._output_lines += text.count(b"\n")
        self._output += text[: LOGGED_BYTES - len(self._output)]
        return bool(text)

    def log_output(self, limit: LogLimit, job: str, name: str) -> None:
        """Log what the process has written to standard error since the last call: the first bytes and the counts."""
        self._read_output()
        if self._output_bytes:
            text = self._output.decode("utf-8", "replace").strip()
            values = {"job": job, "field": name, "lines": self._output_lines, "bytes": self._output_bytes}
            limit.log(log, logging.WARNING, "decoder messages: %s", text, **values)
        self._output, self._output_bytes, self._output_lines = b"", 0, 0

    def close(self) -> None:
        """Kill the process and free its descriptors. Idempotent. Its output until now is kept for `log_output`."""
        self._link.close()
        self._process.kill()
        self._process.wait()
        stream = self._process.stderr
        if stream is not None and not stream.closed:
            while self._read_output() and self._output_bytes < _READ_BYTES * 16 and _has_input(self._errors):
                pass
            stream.close()
            self._errors = -1


def _log_descriptor() -> int:
    """Return where this process logs; in a worker this is not descriptor 2, which native libraries write to."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):  # a stream of another kind
        return 2


def _has_input(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def _memory_file(name: str, size: int, data: memoryview | None = None) -> int:
    """Return the descriptor of a memory file of a fixed size, with `data` in it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        offset = 0
        while data is not None and offset < size:
            offset += os.pwrite(descriptor, data[offset:], offset)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_result(reply: dict[str, Any], target: int, facts: FileFacts) -> DecodedImage:
    """Copy pixels and profile out of the memory file. Raises ValueError for a reply that does not fit the file."""
    shape, profile_bytes = reply["shape"], reply.get("profile", 0)
    sizes = ([facts.height, facts.width], [facts.width, facts.height])
    if not (isinstance(shape, list) and len(shape) == 3 and shape[:2] in sizes and shape[2] in (3, 4)):
        raise ValueError(f"invalid shape {shape} of an image of {facts.width}x{facts.height}")
    if not (isinstance(profile_bytes, int) and 0 <= profile_bytes <= PROFILE_BYTES):
        raise ValueError("invalid size of a colour profile")
    pixels = np.empty(shape, np.uint8)
    view, offset = pixels.data.cast("B"), 0
    while offset < len(view):
        read = os.preadv(target, [view[offset:]], offset)
        if not read:
            raise ValueError("the memory file is too short")
        offset += read
    return DecodedImage(pixels, os.pread(target, profile_bytes, offset))
