"""What fewer steps, other schedulers and engine shortcuts save, and how far their pictures are from the exact ones.

    python -m benchmarks.bench_quality --save                                     the built-in model: distance and cost
    python -m benchmarks.bench_quality --model DIRECTORY --side_px 256 --works 2 --steps 20 --few     a large one: cost alone

Exact is the model's own scheduler at `--steps` (left out: the model's default), guided at every step. Distance is judged where a
picture can be read: on the built-in model, by peak signal-to-noise ratio (decibels, pixels 0..255) and by whether the reader of
the test suite sees the same scene, background and every shape with its colour. Cost is in UNet rows and in seconds of CPU.
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
from benchmarks.results import Result
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.reader import COLOURS, SHAPES, Figure, draw_scene, read_picture

IDENTICAL_DB = 60.0  # a picture without any difference would be infinitely near: the mean needs a number


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make a picture: a share of the exact number of steps, a scheduler, shortcuts."""

    share: float = 1.0
    scheduler: str = ""
    shortcuts: str = ""

    def of(self, work: Work) -> Work:
        """The work made in this way."""
        steps = max(1, round(work.num_inference_steps * self.share))
        return replace(
            work, num_inference_steps=steps, scheduler=self.scheduler, shortcuts=self.shortcuts, cancelled=Event()
        )


WAYS = (
    Way(shortcuts="guidance_every=2"),
    Way(shortcuts="guidance_every=3"),
    Way(shortcuts="guidance_until=0.7"),
    Way(shortcuts="guidance_until=0.5"),
    Way(shortcuts="guidance_every=2,guidance_until=0.7"),
    Way(0.75),
    Way(0.75, "dpmpp_2m"),
    Way(0.75, "unipc"),
    Way(0.75, "dpmpp_2m", "guidance_every=2"),
    Way(0.67, "dpmpp_2m", "guidance_every=2,guidance_until=0.7"),
    Way(0.5),
    Way(0.5, "dpmpp_2m"),
    Way(0.5, "unipc"),
    Way(0.5, "dpmpp_2m", "guidance_every=2,guidance_until=0.7"),
    Way(0.42, "dpmpp_2m"),
    Way(0.42, "dpmpp_2m", "guidance_until=0.6"),
    Way(0.42, "dpmpp_2m", "guidance_every=2,guidance_until=0.7"),
    Way(0.33, "dpmpp_2m"),
    Way(0.33, "dpmpp_2m", "guidance_until=0.6"),
)
# The presets medium and low, and what lies about them; for large models, where every way would take an hour.
FEW = (
    Way(0.75, "dpmpp_2m", "guidance_every=2"),
    Way(0.5, "dpmpp_2m"),
    Way(0.42, "dpmpp_2m", "guidance_until=0.6"),
    Way(0.3, "dpmpp_2m", "guidance_until=0.6"),
)


def make_works(profile: ModelProfile, options: argparse.Namespace) -> list[Work]:
    """Pictures from prompts alone and recoloured shapes, in turns."""
    side = Resolution(options.side_px, options.side_px) if options.side_px else profile.native
    chosen = random.Random(1)
    works = []
    for place in range(options.works):
        background, colour, other = chosen.sample(sorted(COLOURS), 3)
        shape = chosen.choice(SHAPES)
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
    """The pictures, as many at once as the engine takes."""
    waiting, found = list(works), dict[Work, Pixels]()
    in_flight = 0
    while len(found) < len(works):
        while waiting and in_flight < engine.capacity:
            engine.admit(waiting.pop(0))
            in_flight += 1
        for outcome in engine.turn():
            if outcome.pixels is None:
                raise RuntimeError(f"no picture: {outcome.error}")
            found[outcome.work] = outcome.pixels
            in_flight -= 1
    return [found[work] for work in works]


def decibels(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, float(10 * np.log10(255**2 / error)))


def scene(pixels: Pixels) -> tuple[str, list[tuple[str, str]]]:
    """What the reader sees."""
    seen = read_picture(pixels)
    return seen.background, sorted((one.shape, one.colour) for one in seen.objects)


def measure(result: Result, options: argparse.Namespace) -> None:
    """Every way against the exact one."""
    settings = ModelSettings(name="model", path=options.model, engine="stepwise")
    profile = read_profile(settings)
    calls: list[Finished[Call]] = []
    engine = StepwiseEngine(profile, settings, calls.append)
    engine.load(lambda _phase: None)
    works = make_works(profile, options)
    exact: list[Pixels] = []
    for way in (Way(), *(FEW if options.few else WAYS)):
        case = {"share of steps": way.share, "scheduler": way.scheduler or "own", "shortcuts": way.shortcuts or "none"}
        calls.clear()
        began, cpu = time.perf_counter(), time.process_time()
        pictures = make(engine, [way.of(work) for work in works])
        seconds = time.perf_counter() - began
        exact = exact or pictures
        rows = sum(len(call.subject.rows) for call in calls if call.subject.kind == "denoise")
        result.add("rows for a picture", [rows / len(works)], unit="", better="lower", case=case)
        result.add("cpu for a picture", [(time.process_time() - cpu) / len(works)], case=case)
        result.add("time for a picture", [seconds / len(works)], case=case)
        if options.model is None:
            near = [decibels(first, second) for first, second in zip(exact, pictures, strict=True)]
            same = [float(scene(first) == scene(second)) for first, second in zip(exact, pictures, strict=True)]
            result.add("distance", near, unit="dB", better="higher", case=case)
            result.add("same scene", [sum(same) / len(same)], unit="", better="higher", case=case)
            print(f"{case}  rows {rows / len(works):.1f}  mean {np.mean(near):.1f} dB  same scene {np.mean(same):.2f}")
        else:
            print(f"{case}  rows {rows / len(works):.1f}  {seconds / len(works):.2f} s for a picture")
    engine.close()


def main() -> None:
    """Measure, print, and save when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; left out: the built-in model")
    parser.add_argument("--works", type=int, default=48)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--side_px", type=int, default=0)
    parser.add_argument("--few", action="store_true", help="only a few ways beside the exact one")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("quality-full-size" if options.model else "quality", metadata.collect(options.model))
    measure(result, options)
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
