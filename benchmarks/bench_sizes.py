"""Measure models of full size on this machine: seconds of a step and of the rest of an edit, ready time and memory.

    python -m benchmarks.bench_sizes --model sd15=DIRECTORY@512 --model sd15-int8=DIRECTORY@512 --save

Each model is given with the side of its pictures. Each side of the comparison, engine `stepwise` and the bare library,
runs in a process of its own; they take turns. The seconds of a step are the difference of an edit of MOST_STEPS and one
of one step, divided by the steps between them; the rest is what is left of the edit of one step. Random weights of the
same shapes take the same time (`peers/make_sd15.py`, `peers/make_sdxl.py`, `peers/compress.py`), so the distance of the
pictures means little: noise is far from every picture.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import metadata
from benchmarks.bench_references import private_bytes
from benchmarks.results import Result
from ovserve.engines.protocol import Work
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings

MOST_STEPS = 3
SIDES = ("stepwise", "library")
TIMEOUT_S = 1800.0


def make_work(side_px: int, steps: int, seed: int) -> Work:
    """Return an edit whose strength lets all steps run, with guidance."""
    blocks = np.random.default_rng(seed).integers(0, 256, (side_px // 8, side_px // 8, 3), np.uint8)
    return Work(
        job=f"{steps}-{seed}",
        picture=0,
        mode="image2image",
        prompt=f"a house by the sea {seed}",
        negative_prompt="",
        width=side_px,
        height=side_px,
        num_inference_steps=steps,
        guidance_scale=5.0,
        strength=1.0,
        seed=seed,
        initial_image=blocks.repeat(8, axis=0).repeat(8, axis=1),
    )


def run(side: str, directory: Path, side_px: int, edits: int, reply: Connection) -> None:
    """Measure one side of the comparison; send (figure, value) pairs. Runs in a process of its own."""
    settings = ModelSettings(name="model", path=directory, engine="stepwise")
    began = time.perf_counter()
    make = _library(directory) if side == "library" else _engine(settings)
    found = [("ready", time.perf_counter() - began)]
    make(make_work(side_px, 1, 0))  # kernels of this size
    for seed in range(1, edits + 1):
        seconds = {}
        for steps in (1, MOST_STEPS):
            began = time.perf_counter()
            make(make_work(side_px, steps, seed))
            seconds[steps] = time.perf_counter() - began
        step = (seconds[MOST_STEPS] - seconds[1]) / (MOST_STEPS - 1)
        found += [("step", step), ("rest of an edit", seconds[1] - step)]
    found.append(("private memory", private_bytes()))
    reply.send(found)


def _library(directory: Path) -> Any:
    import openvino as ov
    import openvino_genai as og

    pipeline = og.Image2ImagePipeline(str(directory), "CPU")

    def make(work: Work) -> None:
        assert work.initial_image is not None
        pipeline.generate(
            work.prompt,
            ov.Tensor(np.ascontiguousarray(work.initial_image[None])),
            num_inference_steps=work.num_inference_steps,
            guidance_scale=work.guidance_scale,
            strength=work.strength,
            rng_seed=work.seed,
        )

    return make


def _engine(settings: ModelSettings) -> Any:
    from ovserve.engines.stepwise.engine import StepwiseEngine

    engine = StepwiseEngine(read_profile(settings), settings)
    engine.load(lambda _phase: None)

    def make(work: Work) -> None:
        engine.admit(work)
        while not (outcomes := engine.turn()):
            pass
        if outcomes[0].pixels is None:
            raise RuntimeError(f"no picture: {outcomes[0].error}")

    return make


def measure(result: Result, name: str, directory: Path, side_px: int, edits: int) -> None:
    """Add the figures of one model."""
    context = multiprocessing.get_context("spawn")
    for side in SIDES:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(side, directory, side_px, edits, there))
        process.start()
        there.close()
        try:
            if not here.poll(TIMEOUT_S):
                raise RuntimeError(f"{name}: {side} took more than {TIMEOUT_S:g} s")
            found = here.recv()
        finally:
            process.join(60)
            if process.is_alive():
                process.kill()
        for figure, value in found:
            unit = "bytes" if figure == "private memory" else "s"
            result.add(figure, [value], unit=unit, case={"model": name, "side": side, "side_px": side_px})


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIRECTORY@SIDE")
    parser.add_argument("--edits", type=int, default=3, help="pairs of edits in a process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("sizes", metadata.collect())
    for _ in range(options.rounds):
        for each in options.model:
            name, _, rest = each.partition("=")
            directory, _, side_px = rest.rpartition("@")
            measure(result, name, Path(directory), int(side_px), options.edits)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
