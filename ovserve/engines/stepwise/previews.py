"""Estimates of the final picture while it is made: the predicted clean latents through the VAE decoder, in a thread of their own.

The device thread hands latents over and goes on. A preview is decoded at a fraction of the picture's size where decoding is slow
beside a step, so that it takes little from what denoises on the same cores.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

from ovserve.engines.protocol import Preview, Work
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.stepwise.compiled import run_decoder

__all__ = ["Previews", "choose_shrink", "shrunk"]

log = logging.getLogger(__name__)

WAITING_LIMIT = 16  # previews not decoded yet; further ones are dropped: the device is busier than anybody can watch
SHRINKS = (1, 2, 4, 8)
LEAST_CELLS = 16  # of latents on a side: from fewer a decoder makes fog
STEP_SHARE = 0.5  # of a step's time that a preview may cost


@dataclass(frozen=True, slots=True)
class _Asked:
    work: Work
    step: int
    clean: Array


class Previews:
    """Decodes previews, in the order asked for. `request` is an infer request of the VAE decoder that nobody else uses."""

    def __init__(self, request: Any, shrink: int) -> None:
        self._request = request
        self._shrink = shrink
        self._asked: queue.Queue[_Asked | None] = queue.Queue(WAITING_LIMIT)
        self._wanted: set[Work] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="previews", daemon=True)
        self._thread.start()

    def ask(self, work: Work, step: int, clean: Array) -> None:
        """Have `work.on_preview` called with what the clean latents of `step` look like. Returns at once."""
        with self._lock:
            self._wanted.add(work)
        try:
            self._asked.put_nowait(_Asked(work, step, clean))
        except queue.Full:
            log.debug("a preview was dropped: %d wait", WAITING_LIMIT)

    def forget(self, work: Work) -> None:
        """The work has ended: once this returns, `work.on_preview` is not called any more."""
        with self._lock:
            self._wanted.discard(work)

    def close(self) -> None:
        """End the thread, after the preview under way."""
        with self._lock:
            self._wanted.clear()
        self._asked.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            if asked.work not in self._wanted or asked.work.on_preview is None:
                continue
            try:
                pixels = run_decoder(self._request, shrunk(asked.clean, self._shrink))
                with self._lock:
                    if asked.work in self._wanted:
                        asked.work.on_preview(Preview(asked.step, pixels))
            except Exception:  # a preview is a courtesy: what goes wrong with one must not touch the picture
                log.exception("a preview failed")


def shrunk(latents: Array, factor: int) -> Array:
    """Latents (1, C, h, w) averaged over cells of `factor` x `factor`, as far as LEAST_CELLS are left on each side.

    What does not fill a cell is left out.
    """
    _, channels, height, width = latents.shape
    factor = max(1, min(factor, height // LEAST_CELLS, width // LEAST_CELLS))
    height, width = height // factor, width // factor
    cells = latents[:, :, : height * factor, : width * factor].reshape(1, channels, height, factor, width, factor)
    averaged: Array = cells.mean(axis=(3, 5))
    return averaged


def choose_shrink(decode_s: float, step_s: float) -> int:
    """How much smaller a preview is: the least that keeps it cheap beside a step."""
    for factor in SHRINKS:
        if decode_s / factor**2 <= STEP_SHARE * step_s:
            return factor
    return SHRINKS[-1]
