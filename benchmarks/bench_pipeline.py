"""Measure the stepwise engine, with 1 to 16 pictures in flight and no server, against the bare GenAI pipeline.

    python -m benchmarks.bench_pipeline --rounds 5 --save
    python -m benchmarks.bench_pipeline --model DIRECTORY --side_px 256 --steps 4 --clients 1,2,4 --guidance_scale 1
    python -m benchmarks.bench_pipeline --trace run.json --svg run.svg

Both sides make the same pictures: edits with different prompts, images, seeds, strengths and numbers of steps, each
once per round, so that no answer comes from a cache. The pipeline runs with its defaults (all cores for one call); the
two sides alternate in order from round to round. `--pin` gives both sides one thread per call, and then checks that
both make the same bytes for every picture.

Reported: pictures per second, latency from admission to pixels, CPU seconds per picture, rows in a UNet call, and
memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og

from benchmarks import metadata, stats
from benchmarks.edits import BUILTIN_PATH
from benchmarks.results import Result
from benchmarks.traces import chrome_trace, svg
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Resolution

SHAPES = ("red circle", "blue star on green", "two yellow squares", "gray heart", "orange triangle and white moon")
STEP_FACTORS = (1.0, 0.5, 1.5, 0.75, 1.25, 1.0, 0.67, 2.0)  # of the number of steps, from work to work
STRENGTHS = (0.7, 1.0, 0.5, 0.85)


def make_works(profile: ModelProfile, options: argparse.Namespace, start: int) -> list[Work]:
    """Return the works of one round; another `start` gives other prompts, images and seeds."""
    side = Resolution(options.side_px, options.side_px) if options.side_px else profile.native
    works = []
    for place in range(options.works):
        unique = start + place
        generator = np.random.default_rng(unique)
        blocks = generator.integers(0, 256, (side.height // 8, side.width // 8, 3), np.uint8)
        mixed = 1.0 if options.uniform else STEP_FACTORS[place % len(STEP_FACTORS)]
        works.append(
            Work(
                job=f"job-{unique}",
                picture=0,
                mode="image2image",
                prompt=f"{SHAPES[unique % len(SHAPES)]} {unique}",
                negative_prompt="",
                width=side.width,
                height=side.height,
                num_inference_steps=max(1, round(options.steps * mixed)),
                guidance_scale=options.guidance_scale,
                strength=0.7 if options.uniform else STRENGTHS[place % len(STRENGTHS)],
                seed=unique,
                initial_image=blocks.repeat(8, axis=0).repeat(8, axis=1),
                shortcuts=options.shortcuts,
            )
        )
    return works


class Bare:
    """The bare image-to-image pipeline, called for one work after another."""

    def __init__(self, directory: Path, properties: dict[str, Any]) -> None:
        self._pipeline = og.Image2ImagePipeline(str(directory), "CPU", **properties)

    def make(self, works: Sequence[Work]) -> tuple[list[Pixels], list[float]]:
        """Return the pictures and the seconds for each, in the order of the works."""
        pictures, times = [], []
        for work in works:
            began = time.perf_counter()
            image = work.initial_image
            if image is None:
                raise ValueError("the work has no initial image; image to image requires one")
            result = self._pipeline.generate(
                work.prompt,
                ov.Tensor(np.ascontiguousarray(image[None])),
                width=work.width,
                height=work.height,
                num_inference_steps=work.num_inference_steps,
                guidance_scale=work.guidance_scale,
                strength=work.strength,
                rng_seed=work.seed,
            )
            pictures.append(np.array(result.data[0]))
            times.append(time.perf_counter() - began)
        return pictures, times


class Stepwise:
    """The stepwise engine, with a chosen number of pictures in flight."""

    def __init__(self, profile: ModelProfile, settings: ModelSettings, trace: Callable[[Finished[Call]], None]) -> None:
        self.engine = StepwiseEngine(profile, settings, trace)
        self.engine.load(lambda _phase: None)

    def make(self, works: Sequence[Work], clients: int) -> tuple[list[Pixels], list[float]]:
        """Return the pictures and the seconds from admission for each, in the order of the works.

        Args:
            works: the pictures to make.
            clients: the largest number of pictures in flight.
        """
        waiting, began = list(works), dict[Work, float]()
        pictures, times = dict[Work, Pixels](), dict[Work, float]()
        while len(pictures) < len(works):
            while waiting and len(began) - len(pictures) < min(clients, self.engine.capacity):
                work = waiting.pop(0)
                began[work] = time.perf_counter()
                self.engine.admit(work)
            for outcome in self.engine.turn():
                if outcome.pixels is None:
                    raise RuntimeError(f"no picture: {outcome.error}")
                pictures[outcome.work] = outcome.pixels
                times[outcome.work] = time.perf_counter() - began[outcome.work]
        return [pictures[work] for work in works], [times[work] for work in works]


def measure(result: Result, options: argparse.Namespace) -> list[Finished[Call]]:
    """Run all rounds, and return the UNet calls of the last round with the most clients."""
    plugin: dict[str, Any] = {"INFERENCE_PRECISION_HINT": options.precision} if options.precision else {}
    pinned = {"threads": 1, "streams": options.streams or 2} if options.pin else {"streams": options.streams}
    settings = ModelSettings(
        name="model",
        path=options.model or BUILTIN_PATH,
        engine="stepwise",
        plugin_config=json.dumps(plugin) if plugin else "",
        **pinned,
    )
    profile = read_profile(settings)
    calls: list[Finished[Call]] = []
    stepwise = Stepwise(profile, settings, calls.append)
    result.add("memory", [_resident_bytes()], unit="bytes", case={"side": "stepwise"})
    before = _resident_bytes()
    bare = Bare(profile.directory, plugin | ({"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1} if options.pin else {}))
    bare.make(make_works(profile, options, 0)[:2])
    result.add("memory", [_resident_bytes() - before], unit="bytes", case={"side": "bare"})
    last_calls: list[Finished[Call]] = []
    for number in range(options.rounds):
        works = make_works(profile, options, 1000 * (number + 1))
        sides: list[tuple[dict[str, Any], Callable[[], tuple[list[Pixels], list[float]]]]] = [
            ({"side": "bare", "clients": 1}, lambda works=works: bare.make(works))
        ]
        for clients in options.clients:
            fresh = make_works(profile, options, 1000 * (number + 1) + 100_000 * clients) if not options.pin else works
            sides.append(
                (
                    {"side": "stepwise", "clients": clients},
                    lambda fresh=fresh, clients=clients: stepwise.make(fresh, clients),
                )
            )
        expected: list[Pixels] = []
        for case, make in sides if number % 2 == 0 or options.pin else reversed(sides):
            calls.clear()
            began, cpu = time.perf_counter(), time.process_time()
            pictures, times = make()
            seconds = time.perf_counter() - began
            result.add("throughput", [len(works) / seconds], unit="1/s", better="higher", case=case)
            result.add("latency", times, case=case)
            result.add("cpu for a picture", [(time.process_time() - cpu) / len(works)], case=case)
            if denoising := [call for call in calls if call.subject.kind == "denoise"]:
                rows = [len(call.subject.rows) for call in denoising]
                result.add("rows in a call", [sum(rows) / len(rows)], unit="", better="none", case=case)
                last_calls = list(calls)
            if options.pin:
                expected = expected or pictures
                _check_equal(expected, pictures)
    stepwise.engine.close()
    result.add("peak memory", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024], unit="bytes")
    return last_calls


def _check_equal(expected: Sequence[Pixels], pictures: Sequence[Pixels]) -> None:
    for first, second in zip(expected, pictures, strict=True):
        if not np.array_equal(first, second):
            sys.exit("the two sides made different pictures")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()


def main() -> None:
    """Measure, print the result, and save it if --save or --out is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: the built-in model")
    parser.add_argument(
        "--clients",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1, 2, 4, 8, 16],
        help="pictures in flight, separated by commas (1,2,4,8,16)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--works", type=int, default=32, help="pictures in a round (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="number of steps, varied from work to work (%(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="(%(default)s)")
    parser.add_argument("--side_px", type=int, default=0, help="side of the pictures; default: the model's native size")
    parser.add_argument("--uniform", action="store_true", help="the same steps and strength for every work")
    parser.add_argument(
        "--pin", action="store_true", help="one thread per call on both sides, and compare the pictures"
    )
    parser.add_argument("--streams", type=int, default=0, help="streams of stepwise; 0: chosen by the engine")
    parser.add_argument("--precision", default="", help="INFERENCE_PRECISION_HINT; default: the plugin's default")
    parser.add_argument("--shortcuts", default="", help="engine shortcuts of a quality preset; stepwise only")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of the last round with the most clients")
    parser.add_argument("--svg", type=Path, help="draw the same round as SVG")
    parser.add_argument("--save", action="store_true", help="write a result file")
    parser.add_argument("--out", type=Path, help="path of the result file; implies --save")
    options = parser.parse_args()
    result = Result("pipeline", metadata.collect(options.model))
    calls = measure(result, options)
    print(result.report())
    bare = result.find("throughput", side="bare").values
    for clients in options.clients:
        ours = result.find("throughput", side="stepwise", clients=clients).values
        print(f"stepwise with {clients} in flight / bare pipeline: {stats.ratio(ours, bare)}")
    if options.trace:
        options.trace.write_text(json.dumps(chrome_trace(calls)), "utf-8")
    if options.svg:
        options.svg.write_text(svg(calls), "utf-8")
    if options.save or options.out:
        print(result.save(options.out))


if __name__ == "__main__":
    main()
