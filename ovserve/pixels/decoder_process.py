"""The decoding process: decodes one image file at a time for the worker that spawned it.

It imports Pillow and numpy, and no OpenVINO. `ovserve.pixels.decoder` is the worker's side and describes the exchange.
Before each file the process sets its own memory and CPU limits. When the CPU time is used up, SIGPROF (default action:
terminate) ends it. Runs in: the decoding process, a child of a worker.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import socket
import warnings
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from ovserve.errors import ImageError
from ovserve.logs import configure_logs
from ovserve.pixels import bmp_rle, heic
from ovserve.pixels.images import FORMATS, Limits, Pixels, decode_image, encode_image, extract_colour_profile
from ovserve.stacks import watch_for_stacks
from ovserve.wire.local.processes import bind_to_parent

__all__ = ["MESSAGE_BYTES", "main"]

MESSAGE_BYTES = 8192  # maximum size of a message in either direction
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SPARE_CPU_S = 2  # RLIMIT_CPU counts whole seconds, and fires only if the timer did not
_TRIM_BYTES = 16 << 20  # call malloc_trim when the address space has grown by more than this


def main(descriptor: int, parent: int, log_to: tuple[int, str] | None = None) -> NoReturn:
    """Serve the requests of the worker `parent` on a socket until it closes.

    Args:
        descriptor: the socket, SOCK_SEQPACKET.
        parent: the worker's process id; this process ends with it.
        log_to: descriptor and format of the log, which gets the stacks of this process at SIGUSR1; None: no stacks.
    """
    bind_to_parent(parent)
    if log_to is not None:
        log_descriptor, form = log_to
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        configure_logs("warning", form, stream=open(log_descriptor, "w", buffering=1, encoding="utf-8"))  # noqa: SIM115
        watch_for_stacks(f"decoder of worker {parent}")
    Image.MAX_IMAGE_PIXELS = None  # disabled: `Limits` is checked instead
    warnings.simplefilter("ignore")  # ignore Pillow's warnings about client files
    bmp_rle.register()
    link = socket.socket(fileno=descriptor)
    _warm_up()
    base_bytes = _address_space_bytes()
    link.send(json.dumps({"ready": True}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 2)
        if not message:
            os._exit(0)
        source, target = descriptors
        reply = _serve(json.loads(message), source, target, base_bytes)
        os.close(source)
        os.close(target)
        link.send(json.dumps(reply).encode())


def _warm_up() -> None:
    """Decode a small image of each format: it imports the decoders, and shows that they work."""
    pixels: Pixels = np.full((16, 16, 3), 90, np.uint8)
    files = [encode_image(pixels, form) for form in ("png", "jpeg", "webp")]
    if heic.FORMAT in FORMATS:
        files.append(heic.SAMPLE)
    for form in set(FORMATS) - {"PNG", "JPEG", "WEBP", heic.FORMAT}:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        files.append(buffer.getvalue())
    for data in files:
        decode_image(data, "image", Limits(1 << 20, 1 << 10))


def _serve(request: dict[str, Any], source: int, target: int, base_bytes: int) -> dict[str, Any]:
    """Decode one file into the descriptor `target`; return the reply to the worker."""
    _limit(request["cpu_s"], request["memory_bytes"], base_bytes)
    try:
        data = _read(source, request["size"])
        pixels = decode_image(data, request["name"], Limits(request["pixels"], request["side_px"]))
        profile = extract_colour_profile(data) if request["profile"] else b""
        _write(target, pixels, profile)
    except ImageError as error:
        return {"error": error.message}
    except MemoryError:
        return {"memory": True}
    except OSError as error:
        return {"error": f"{request['name']}: the decoded image does not have the size in its header ({error})"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_soft(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    return {"shape": list(pixels.shape), "profile": len(profile)}


def _limit(cpu_s: float, memory_bytes: int, base_bytes: int) -> None:
    """Limit the CPU time and the memory from now on, beyond what this process has used before."""
    if _address_space_bytes() > base_bytes + _TRIM_BYTES:
        ctypes.CDLL(None).malloc_trim(0)
    _limit_soft(resource.RLIMIT_AS, base_bytes + memory_bytes)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit_soft(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + cpu_s) + _SPARE_CPU_S)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _limit_soft(kind: int, value: int) -> None:
    """Set a soft limit, at most to the hard one, which the service manager may have set."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY and (value == resource.RLIM_INFINITY or value > hard):
        value = hard
    resource.setrlimit(kind, (value, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[0]) * _PAGE_BYTES


def _read(source: int, size: int) -> bytes:
    """Return the encoded file."""
    with open(source, "rb", buffering=0, closefd=False) as stream:
        stream.seek(0)
        return stream.read(size)


def _write(target: int, pixels: Pixels, profile: bytes) -> None:
    """Write pixels and profile to the memory file, which cannot grow. Raises OSError if they do not fit."""
    offset = 0
    for part in (pixels.data.cast("B"), memoryview(profile)):
        end = offset + len(part)
        while offset < end:
            offset += os.pwrite(target, part[offset - end :], offset)
