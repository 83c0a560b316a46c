"""Measure quality presets (fewer steps, schedulers, shortcuts): their cost, and the distance from exact pictures.

    # the built-in model: distance and cost
    python -m benchmarks.bench_quality --save
    # a large model: cost only
    python -m benchmarks.bench_quality --model DIRECTORY --side_px 256 --works 2 --steps 20 --few

Exact means: the model's own scheduler at `--steps` (default: the model's default), guided at every step. Distance is
measured on the built-in model only, because the test suite can read its pictures: by peak signal-to-noise ratio
(decibels, pixels 0..255), and by whether the reader finds the same scene, that is the background and every shape with
its colour. Cost is in UNet rows and in seconds of CPU time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np

from benchmarks import metadata
from benchmarks.edits import BUILTIN_PATH
from benchmarks.results import Result
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.reader import COLOURS, SHAPES, Figure, draw_scene, read_picture

IDENTICAL_DB = 60.0  # upper limit: for equal pictures the ratio is infinite, and the mean requires a finite number


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make a picture.

    Attributes:
        share: part of the exact number of steps.
        scheduler: empty: the model's own.
        shortcuts: of the engine; empty: none.
    """

    share: float = 1.0
    scheduler: str = ""
    shortcuts: str = ""

    def apply(self, work: Work) -> Work:
        """Return the work with this variant's steps, scheduler and shortcuts."""
        steps = max(1, round(work.num_inference_steps * self.share))
        return replace(
            work, num_inference_steps=steps, scheduler=self.scheduler, shortcuts=self.shortcuts, cancelled=Event()
        )


VARIANTS = (
    Variant(shortcuts="denoise_every=2"),
    Variant(shortcuts="denoise_every=3"),
    Variant(0.5, "dpmpp_2m", "denoise_every=2"),
    Variant(0.75, "dpmpp_2m", "denoise_every=2"),
    Variant(shortcuts="guidance_every=2"),
    Variant(shortcuts="guidance_every=3"),
    Variant(shortcuts="guidance_until=0.7"),
    Variant(shortcuts="guidance_until=0.5"),
    Variant(shortcuts="guidance_every=2,guidance_until=0.7"),
    Variant(0.75),
    Variant(0.75, "dpmpp_2m"),
    Variant(0.75, "unipc"),
    Variant(0.75, "dpmpp_2m", "guidance_every=2"),
    Variant(0.67, "dpmpp_2m", "guidance_every=2,guidance_until=0.7"),
    Variant(0.5),
    Variant(0.5, "dpmpp_2m"),
    Variant(0.5, "unipc"),
    Variant(0.5, "dpmpp_2m", "guidance_every=2,guidance_until=0.7"),
    Variant(0.42, "dpmpp_2m"),
    Variant(0.42, "dpmpp_2m", "guidance_until=0.6"),
    Variant(0.42, "dpmpp_2m", "guidance_every=2,guidance_until=0.7"),
    Variant(0.33, "dpmpp_2m"),
    Variant(0.33, "dpmpp_2m", "guidance_until=0.6"),
)
# The presets medium and low, and variants close to them; for large models, where all variants would take an hour.
FEW_VARIANTS = (
    Variant(shortcuts="denoise_every=2"),
    Variant(shortcuts="denoise_every=3"),
    Variant(0.5, "dpmpp_2m", "denoise_every=2"),
    Variant(0.75, "dpmpp_2m", "denoise_every=2"),
    Variant(0.75, "dpmpp_2m", "guidance_every=2"),
    Variant(0.5, "dpmpp_2m"),
    Variant(0.42, "dpmpp_2m", "guidance_until=0.6"),
    Variant(0.3, "dpmpp_2m", "guidance_until=0.6"),
)


def make_works(profile: ModelProfile, options: argparse.Namespace) -> list[Work]:
    """Return works that alternate between text to image and edits that change the colour of a shape."""
    side = Resolution(options.side_px, options.side_px) if options.side_px else profile.native
    rng = random.Random(1)
    works = []
    for place in range(options.works):
        background, colour, other = rng.sample(sorted(COLOURS), 3)
        shape = rng.choice(SHAPES)
        drawn = draw_scene(
            background, [Figure(colour, shape, side.width / 2, side.height / 2, side.width / 4)], side.width
        )
        is_edit = place % 2 == 1
        works.append(
            Work(
                job=f"job-{place}",
                picture=0,
                mode="image2image" if is_edit else "text2image",
                prompt=f"a {other if is_edit else colour} {shape} on a {background} background",
                negative_prompt="",
                width=side.width,
                height=side.height,
                num_inference_steps=options.steps or profile.defaults.num_inference_steps,
                guidance_scale=profile.defaults.guidance_scale,
                strength=0.7 if is_edit else 1.0,
                seed=place,
                initial_image=drawn if is_edit else None,
            )
        )
    return works


def make(engine: StepwiseEngine, works: Sequence[Work]) -> list[Pixels]:
    """Return the pictures of the works, with as many in flight as the engine takes."""
    waiting, pictures = list(works), dict[Work, Pixels]()
    in_flight = 0
    while len(pictures) < len(works):
        while waiting and in_flight < engine.capacity:
            engine.admit(waiting.pop(0))
            in_flight += 1
        for outcome in engine.turn():
            if outcome.pixels is None:
                raise RuntimeError(f"no picture: {outcome.error}")
            pictures[outcome.work] = outcome.pixels
            in_flight -= 1
    return [pictures[work] for work in works]


def decibels(first: Pixels, second: Pixels) -> float:
    """Return the peak signal-to-noise ratio, at most IDENTICAL_DB."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, float(10 * np.log10(255**2 / error)))


def read_scene(pixels: Pixels) -> tuple[str, list[tuple[str, str]]]:
    """Return the background, and the shape and colour of each object, as the reader finds them."""
    scene = read_picture(pixels)
    return scene.background, sorted((item.shape, item.colour) for item in scene.objects)


def measure(result: Result, options: argparse.Namespace) -> None:
    """Make the works with every variant, and add cost and distance from the exact pictures to the result."""
    settings = ModelSettings(name="model", path=options.model or BUILTIN_PATH, engine="stepwise")
    profile = read_profile(settings)
    calls: list[Finished[Call]] = []
    engine = StepwiseEngine(profile, settings, calls.append)
    engine.load(lambda _phase: None)
    works = make_works(profile, options)
    exact: list[Pixels] = []
    for variant in (Variant(), *(FEW_VARIANTS if options.few else VARIANTS)):
        case = {
            "share of steps": variant.share,
            "scheduler": variant.scheduler or "own",
            "shortcuts": variant.shortcuts or "none",
        }
        calls.clear()
        began, cpu = time.perf_counter(), time.process_time()
        pictures = make(engine, [variant.apply(work) for work in works])
        seconds = time.perf_counter() - began
        exact = exact or pictures
        rows = sum(len(call.subject.rows) for call in calls if call.subject.kind == "denoise")
        result.add("rows for a picture", [rows / len(works)], unit="", better="lower", case=case)
        result.add("cpu for a picture", [(time.process_time() - cpu) / len(works)], case=case)
        result.add("time for a picture", [seconds / len(works)], case=case)
        if options.model is None:
            distances = [decibels(first, second) for first, second in zip(exact, pictures, strict=True)]
            same = [
                float(read_scene(first) == read_scene(second)) for first, second in zip(exact, pictures, strict=True)
            ]
            result.add("distance", distances, unit="dB", better="higher", case=case)
            result.add("same scene", [sum(same) / len(same)], unit="", better="higher", case=case)
            outcome = f"mean {np.mean(distances):.1f} dB  same scene {np.mean(same):.2f}"
        else:
            outcome = f"{seconds / len(works):.2f} s per picture"
        print(f"{case}  rows {rows / len(works):.1f}  {outcome}")
    engine.close()


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: the built-in model")
    parser.add_argument("--works", type=int, default=48, help="pictures for each variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="exact number of steps; default: the model's default")
    parser.add_argument("--side_px", type=int, default=0, help="side of the pictures; default: the model's native size")
    parser.add_argument("--few", action="store_true", help="only a few variants beside the exact one")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("quality-full-size" if options.model else "quality", metadata.collect(options.model))
    measure(result, options)
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
