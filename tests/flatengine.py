"""An engine that paints one grey, for cases that no real model produces: a huge capacity and broken previews."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from ovserve.engines.protocol import Features, Outcome, Pixels, Preview, Work
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.link import WorkerLink
from ovserve.wire.messages import Counts
from ovserve.worker.runner import JobRunner

BROKEN = "the first preview is broken"  # the prompt that gives a preview that cannot be encoded


class FlatEngine:
    """An engine with a huge capacity that makes the previews and the picture of one work in each turn."""

    name = "flat"
    capacity = 100_000
    features = Features(frozenset({"text2image", "image2image", "inpainting"}), previews=True)

    def __init__(self) -> None:
        self.tuned: dict[str, int] = {}
        self._works: deque[Work] = deque()

    def load(self, beat: Callable[[str], None]) -> None:
        beat("warm-up")

    def check(self, request: object) -> None:
        pass

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        return len(prompt.split())

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        return prompt

    def admit(self, work: Work) -> None:
        self._works.append(work)

    def turn(self) -> Sequence[Outcome]:
        if not self._works:
            return []
        work = self._works.popleft()
        pixels = np.full((work.height, work.width, 3), 128, np.uint8)
        for number, step in enumerate(sorted(work.previews)):
            is_broken = work.prompt == BROKEN and number == 0
            if work.on_preview:
                work.on_preview(Preview(step, np.zeros(3, np.uint8) if is_broken else pixels))
        return [Outcome(work, pixels)]

    def counts(self) -> Counts:
        return Counts()

    def use_idle_time(self) -> bool:
        return False

    def phase(self) -> str:
        return "denoise" if self._works else "idle"

    def close(self) -> None:
        self._works.clear()


class CountingEngine(FlatEngine):
    """Paints each picture in the grey that is the number of earlier works whose pixels still exist, without the GC."""

    capacity = 1

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[weakref.ref[Pixels]] = []

    def load(self, beat: Callable[[str], None]) -> None:
        super().load(beat)
        gc.collect()
        gc.disable()

    def admit(self, work: Work) -> None:
        super().admit(work)
        assert work.initial_image is not None
        self._seen.append(weakref.ref(work.initial_image))

    def turn(self) -> Sequence[Outcome]:
        count = sum(seen() is not None for seen in self._seen[:-1])
        return [Outcome(done.work, np.full_like(done.pixels, count)) for done in super().turn()]


def counting_main(
    link: WorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> NoReturn:
    """Run a worker with the counting engine; the spawn target."""
    create_engine = lambda _profile, _model: (CountingEngine(), "test")  # noqa: E731
    JobRunner(link, blobs, profile, model, settings, create_engine=create_engine).run()


def main(
    link: WorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> NoReturn:
    """Run a worker with this engine; the spawn target."""
    create_engine = lambda _profile, _model: (FlatEngine(), "test")  # noqa: E731
    JobRunner(link, blobs, profile, model, settings, create_engine=create_engine).run()
