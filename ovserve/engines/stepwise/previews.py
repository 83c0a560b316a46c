"""Previews of pictures in flight: the predicted clean latents, decoded by the VAE in a separate thread.

The device thread enqueues latents and continues. Where decoding is slow compared with a step, a preview is decoded at a
fraction of the picture's size, so that it takes little time from the denoising on the same cores.
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

__all__ = ["Previews", "choose_shrink", "downscale"]

log = logging.getLogger(__name__)

MAX_QUEUED = 16  # previews waiting to be decoded; further ones are dropped
SHRINKS = (1, 2, 4, 8)
MIN_CELLS = 16  # latents on a side; from fewer, the decoded preview is a blur
MAX_STEP_SHARE = 0.5  # of a step's duration that decoding a preview may take


@dataclass(frozen=True, slots=True)
class _Queued:
    work: Work
    step: int
    clean: Array


class Previews:
    """Decodes previews in the order they were enqueued.

    Args:
        request: an infer request of the VAE decoder that is used only here.
        shrink: by how much a side of a preview is smaller than the picture's.
    """

    def __init__(self, request: Any, shrink: int) -> None:
        self._request = request
        self._shrink = shrink
        self._queue: queue.Queue[_Queued | None] = queue.Queue(MAX_QUEUED)
        self._wanted: set[Work] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="previews", daemon=True)
        self._thread.start()

    def enqueue(self, work: Work, step: int, clean: Array) -> None:
        """Schedule a call of `work.on_preview` with the decoded clean latents of `step`. Never blocks."""
        with self._lock:
            self._wanted.add(work)
        try:
            self._queue.put_nowait(_Queued(work, step, clean))
        except queue.Full:
            log.debug("preview dropped: %d are queued already", MAX_QUEUED)

    def discard(self, work: Work) -> None:
        """Drop the previews of work that has ended: after the return, `work.on_preview` is not called any more."""
        with self._lock:
            self._wanted.discard(work)

    def close(self) -> None:
        """Stop the thread after the preview in progress."""
        with self._lock:
            self._wanted.clear()
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (queued := self._queue.get()) is not None:
            if queued.work not in self._wanted or queued.work.on_preview is None:
                continue
            try:
                pixels = run_decoder(self._request, downscale(queued.clean, self._shrink))
                with self._lock:
                    if queued.work in self._wanted:
                        queued.work.on_preview(Preview(queued.step, pixels))
            except Exception:  # previews are best effort: an error must not affect the picture
                log.exception("preview failed")


def downscale(latents: Array, factor: int) -> Array:
    """Average latents (1, C, h, w) over cells of `factor` x `factor`.

    The factor is reduced so that MIN_CELLS remain on each side. Incomplete cells at the edge are dropped.
    """
    _, channels, height, width = latents.shape
    factor = max(1, min(factor, height // MIN_CELLS, width // MIN_CELLS))
    height, width = height // factor, width // factor
    cells = latents[:, :, : height * factor, : width * factor].reshape(1, channels, height, factor, width, factor)
    averaged: Array = cells.mean(axis=(3, 5))
    return averaged


def choose_shrink(decode_s: float, step_s: float) -> int:
    """Return the smallest factor that keeps decoding a preview cheap compared with a step."""
    for factor in SHRINKS:
        if decode_s / factor**2 <= MAX_STEP_SHARE * step_s:
            return factor
    return SHRINKS[-1]
