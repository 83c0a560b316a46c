"""Previews: order, limits, size, and that failures do not matter."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ovserve.engines.protocol import Preview, Work
from ovserve.engines.stepwise.previews import MAX_QUEUED, Previews, choose_shrink, downscale

WAIT_S = 10.0


class ToyDecoder:
    """An infer request whose pixels are the first latent channel. `infer` waits for `may_run` and fails above 200."""

    def __init__(self) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.calls = 0
        self._latents = np.zeros((1, 1, 1, 1), np.float32)

    def infer(self, inputs: dict[int, Any], **_options: Any) -> None:
        assert self.may_run.wait(WAIT_S)
        self.calls += 1
        self._latents = inputs[0]
        if self._latents.max() > 200:
            raise RuntimeError("too bright")

    def get_output_tensor(self, _index: int) -> Any:
        pixels = np.repeat(self._latents[:, 0, :, :, None], 3, axis=3).astype(np.uint8)
        return SimpleNamespace(data=pixels)


def work(got: list[Preview], arrived: threading.Semaphore) -> Work:
    def on_preview(preview: Preview) -> None:
        got.append(preview)
        arrived.release()

    return Work("job", 0, "text2image", "", "", 64, 64, 4, 1.0, 1.0, 0, on_preview=on_preview)


def latents(value: float) -> np.ndarray:
    return np.full((1, 4, 32, 32), value, np.float32)


@pytest.mark.usefixtures("leak_guard")
def test_previews_are_decoded_smaller_and_in_order() -> None:
    previews, got, arrived = Previews(ToyDecoder(), 2), list[Preview](), threading.Semaphore(0)
    wanted = work(got, arrived)
    for step in (1, 2, 3):
        previews.enqueue(wanted, step, latents(10.0 * step))
    for _ in range(3):
        assert arrived.acquire(timeout=WAIT_S)
    previews.close()
    assert [(preview.step, preview.pixels.shape, preview.pixels.max()) for preview in got] == [
        (1, (16, 16, 3), 10),
        (2, (16, 16, 3), 20),
        (3, (16, 16, 3), 30),
    ]


@pytest.mark.usefixtures("leak_guard")
def test_discarded_work_gets_no_preview() -> None:
    decoder, got, arrived = ToyDecoder(), list[Preview](), threading.Semaphore(0)
    previews = Previews(decoder, 1)
    decoder.may_run.clear()
    first, second = work(got, arrived), work([], arrived)
    previews.enqueue(first, 1, latents(1.0))
    previews.enqueue(first, 2, latents(2.0))
    previews.enqueue(second, 1, latents(3.0))
    previews.discard(first)
    decoder.may_run.set()
    assert arrived.acquire(timeout=WAIT_S)  # of the second; those of the first were dropped
    previews.close()
    assert got == []


@pytest.mark.usefixtures("leak_guard")
def test_failed_preview_is_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    previews, got, arrived = Previews(ToyDecoder(), 1), list[Preview](), threading.Semaphore(0)
    wanted = work(got, arrived)
    previews.enqueue(wanted, 1, latents(255.0))
    previews.enqueue(wanted, 2, latents(100.0))
    assert arrived.acquire(timeout=WAIT_S)
    previews.close()
    assert [preview.step for preview in got] == [2]
    assert "preview failed" in caplog.text


@pytest.mark.usefixtures("leak_guard")
def test_enqueue_never_blocks_and_drops_previews_beyond_the_limit() -> None:
    decoder, got, arrived = ToyDecoder(), list[Preview](), threading.Semaphore(0)
    previews = Previews(decoder, 1)
    decoder.may_run.clear()
    wanted = work(got, arrived)
    for step in range(3 * MAX_QUEUED):
        previews.enqueue(wanted, step, latents(1.0))
    decoder.may_run.set()
    assert arrived.acquire(timeout=WAIT_S)
    previews.discard(wanted)
    previews.close()
    assert decoder.calls <= MAX_QUEUED + 1


def test_downscale_averages_whole_cells() -> None:
    ramp = np.arange(2 * 35 * 33, dtype=np.float32).reshape(1, 2, 35, 33)
    small = downscale(ramp, 2)
    assert small.shape == (1, 2, 17, 16)
    assert small[0, 0, 0, 0] == ramp[0, 0, :2, :2].mean()
    assert small[0, 1, 16, 15] == ramp[0, 1, 32:34, 30:32].mean()
    np.testing.assert_array_equal(downscale(ramp, 1), ramp)


@pytest.mark.parametrize(("side", "factor", "left"), [(16, 8, 16), (31, 2, 31), (64, 8, 16), (64, 2, 32), (8, 4, 8)])
def test_downscale_leaves_a_minimum_of_latents(side: int, factor: int, left: int) -> None:
    assert downscale(np.zeros((1, 4, side, side), np.float32), factor).shape == (1, 4, left, left)


@pytest.mark.parametrize(
    ("decode_s", "step_s", "shrink"), [(0.001, 0.01, 1), (0.01, 0.01, 2), (3.0, 1.3, 4), (100.0, 0.1, 8)]
)
def test_shrink_keeps_decoding_within_half_a_step(decode_s: float, step_s: float, shrink: int) -> None:
    assert choose_shrink(decode_s, step_s) == shrink
