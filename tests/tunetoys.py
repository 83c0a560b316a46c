"""A toy trial for `ovserve tune`: the plan says whether its process crashes, hangs or measures."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import struct
import threading
from multiprocessing.connection import Connection
from typing import Any

from ovserve.models.plans import Plan
from ovserve.settings.options import Resolution
from ovserve.worker.trials import Measured, Trial, send

__all__ = [
    "CLOSES",
    "CODE",
    "CRASHES",
    "CUTS",
    "FAILS",
    "HANGS",
    "LEAVES",
    "MEASURED",
    "MEASURES",
    "NONSENSE",
    "STOPS",
    "TOO_LONG",
    "toy",
]

MEASURES, CRASHES, HANGS, LEAVES, FAILS, CLOSES, STOPS, CUTS, CODE, NONSENSE, TOO_LONG = (
    Plan({}, {"threads": number}) for number in range(11)
)
MEASURED = Measured("toy", "f32", Resolution(64, 64), 1.0, 2.0, 0.5, 4, 1 << 20, math.inf, bytes(64 * 64 * 3))


class Code:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what to call: a change of the environment."""
        return os.putenv, ("OVSERVE_UNPICKLED", "1")


def toy(link: Connection, trial: Trial) -> None:
    """Do what the plan says. In place of `ovserve.worker.trials.main`."""
    if trial.plan == CRASHES:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if trial.plan == HANGS:
        print("hangs", flush=True)
        threading.Event().wait()
    if trial.plan == LEAVES:
        os._exit(7)
    if trial.plan == FAILS:
        send(link, "model: weights are missing")
        return
    if trial.plan == CLOSES:
        link.close()
        threading.Event().wait()
    if trial.plan in (STOPS, CUTS):
        os.write(link.fileno(), struct.pack("!i", 1000) + b"the first bytes")  # a message of Connection.send_bytes
        if trial.plan == CUTS:
            os._exit(9)
        threading.Event().wait()
    if trial.plan == CODE:
        link.send(Code())
        return
    if trial.plan == NONSENSE:
        link.send_bytes(b'{"size": [1, 1], "step_s": NaN}')
        return
    if trial.plan == TOO_LONG:
        link.send_bytes(bytes(1 << 20))
        return
    is_like = trial.reference in (b"", MEASURED.pixels)
    send(link, dataclasses.replace(MEASURED, psnr=math.inf if is_like else 0.0))
