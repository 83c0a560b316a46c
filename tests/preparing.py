"""Helpers for tests of request preparation: uploads, requests, and an engine that only counts words."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovserve.engines.checks import check_scheduler, check_step_count
from ovserve.engines.protocol import Engine, Features
from ovserve.errors import ApiError
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.pixels.images import Pixels
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import Blob
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.request import ImageRequest
from ovserve.worker.prepare import prepare
from ovserve.worker.prepared import PreparedRequest
from tests.live import BUILTIN_PATH

StoreBlob = Callable[[bytes], Blob]

MODEL = ModelSettings(name="shapes", path=Path(BUILTIN_PATH))
PROFILE = dataclasses.replace(read_profile(MODEL), drops_unknown_words=False)  # the engine here knows every word
# Works at 64 to 256 px, in multiples of 16.
WIDE = dataclasses.replace(PROFILE, native=Resolution(64, 64), min_side_px=64, max_side_px=256)
NOISE = np.random.default_rng(5)


class WordCounter:
    """The part of an engine that preparation uses: one token per word (two for CLIP), plus a start and an end token."""

    name = "words"
    capacity = 1

    def __init__(self, profile: ModelProfile) -> None:
        self.features = Features(profile.tasks, frozenset({"ddim", "lcm"}), previews=True)
        self._profile = profile

    def check(self, request: ImageRequest) -> None:
        check_scheduler(request, self.features.schedulers)
        check_step_count(request, self._profile)

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        return len(prompt.split()) * (2 if clip else 1) + 2

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        return " ".join(prompt.split()[: 37 if clip else PROFILE.prompt_tokens - 2])


BLOBS = MemoryBlobs()


def engine_of(profile: ModelProfile, **features: Any) -> Engine:
    """Return an engine for this model, with other features if given; preparation never loads or runs it."""
    engine = WordCounter(profile)
    engine.features = dataclasses.replace(engine.features, **features)
    return engine  # type: ignore[return-value]


def stored_blobs() -> Iterator[StoreBlob]:
    """Yield a function that stores bytes as a blob for `prepared`; the body of a fixture."""
    segments = []

    def store(data: bytes) -> Blob:
        segments.append(BLOBS.put(data))
        return segments[-1].blob(0, len(data))

    yield store
    for segment in segments:
        segment.release()


def png(pixels: Pixels) -> bytes:
    """Encode pixels as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, planes: int = 3) -> Pixels:
    """Return random pixels."""
    return NOISE.integers(0, 256, (height, width, planes), np.uint8)


def with_alpha(*alphas: int) -> Pixels:
    """Return 64x64 random pixels whose first rows have these alphas; the other rows are opaque."""
    pixels = noise(64, 64, 4)
    pixels[..., 3] = 255
    for row, alpha in enumerate(alphas):
        pixels[row, :, 3] = alpha
    return pixels


def request(**values: Any) -> ImageRequest:
    """Return an edit request with defaults."""
    return ImageRequest(
        **{"task": "edit", "prompt": "a cat", "num_inference_steps": 12, "guidance_scale": 3.0, **values}
    )


def prepared(
    profile: ModelProfile = WIDE, model: ModelSettings = MODEL, engine: Engine | None = None, **values: Any
) -> PreparedRequest:
    """Prepare a request."""
    return prepare(
        request(**values), profile, model, WorkerSettings.of(Settings()), engine or engine_of(profile), blobs=BLOBS
    )


def rejected(kind: type[ApiError], param: str, *texts: str, profile: ModelProfile = WIDE, **values: Any) -> None:
    """Assert that a request is rejected as a client error of this kind, naming `param`, with `texts` in the message."""
    with pytest.raises(kind) as caught:
        prepared(profile, **values)
    assert caught.value.param == param
    assert caught.value.status in (400, 413)
    for text in texts:
        assert text in caught.value.message
