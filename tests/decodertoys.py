"""A decoding process that misbehaves on purpose: the field's name chooses how. Others are decoded as always."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from ovserve.pixels import decoder_process
from ovserve.pixels.images import Limits, Pixels, decode_image

__all__ = ["command", "main"]


def _loop() -> None:
    while True:
        sum(range(1_000_000))


def _wrong_output() -> Pixels:
    return np.zeros((1, 1, 3), np.uint8)


def _large_output() -> Pixels:
    return np.zeros((1000, 1000, 3), np.uint8)


def _write_lines() -> None:
    for index in range(30_000):
        os.write(2, b"Fax3Decode1D: bad code word at line %d\n" % index)


def _kill_first() -> None:
    """Die as by the kernel's OOM killer, once."""
    marker = os.environ["TOY_MARKER"]
    if not os.path.exists(marker):
        with open(marker, "xb"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)


_BEHAVIOURS: dict[str, Callable[[], Pixels | None]] = {
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(3),
    "hang": lambda: time.sleep(1000),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "killed_once": _kill_first,
    "loop": _loop,
    "memory": lambda: bytearray(1 << 30) and None,
    "wrong_output": _wrong_output,
    "large_output": _large_output,
    "noisy": _write_lines,
}


def main(descriptor: int, parent: int, log_to: tuple[int, str]) -> None:
    """Serve as the real process does, with the behaviours above."""

    def decode(data: bytes, name: str, limits: Limits) -> Pixels:
        behave = _BEHAVIOURS.get(name)
        pixels = behave() if behave else None
        return decode_image(data, name, limits) if pixels is None else pixels

    decoder_process.decode_image = decode  # type: ignore[assignment]
    decoder_process.main(descriptor, parent, log_to)


def command(descriptor: int, parent: int, log_to: tuple[int, str]) -> Sequence[str]:
    """Return the command line of this process, for `Decoder`."""
    path = [entry or os.getcwd() for entry in sys.path]
    call = f"main({descriptor}, {parent}, {log_to!r})"
    program = f"import sys; sys.path[:] = {path!r}; from tests.decodertoys import main; {call}"
    return [sys.executable, "-c", program]
