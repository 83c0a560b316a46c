"""An engine that paints one grey, for cases that no real model produces: a huge capacity and broken previews."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from ovserve.engines.protocol import Features, Outcome, Preview, Work
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.link import WorkerLink
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

    def phase(self) -> str:
        return "denoise" if self._works else "idle"

    def close(self) -> None:
        self._works.clear()


def main(
    link: WorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> NoReturn:
    """Run a worker with this engine; the spawn target."""
    create_engine = lambda _profile, _model: (FlatEngine(), "test")  # noqa: E731
    JobRunner(link, blobs, profile, model, settings, create_engine=create_engine).run()
