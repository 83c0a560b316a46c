"""A toy trial for `ovserve tune`: the plan says whether its process crashes, hangs or measures."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading

from ovserve.models.plans import Plan
from ovserve.settings.options import Resolution
from ovserve.worker.trials import Measured, Sender, Trial

__all__ = ["CRASHES", "FAILS", "HANGS", "LEAVES", "MEASURED", "MEASURES", "toy"]

MEASURES, CRASHES, HANGS, LEAVES, FAILS = (Plan({}, {"threads": number}) for number in range(5))
MEASURED = Measured("toy", "f32", Resolution(64, 64), 1.0, 2.0, 0.5, 4, 1 << 20, math.inf, b"picture")


def toy(link: Sender, trial: Trial) -> None:
    """Do what the plan says. In place of `ovserve.worker.trials.main`."""
    if trial.plan == CRASHES:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if trial.plan == HANGS:
        threading.Event().wait()
    if trial.plan == LEAVES:
        os._exit(7)
    if trial.plan == FAILS:
        link.send("model: weights are missing")
        return
    is_like = trial.reference in (b"", MEASURED.pixels)
    link.send(dataclasses.replace(MEASURED, psnr=math.inf if is_like else 0.0))
