"""Measure a transformer that edits by reference: the cost of a step, of references, and of sharing calls; memory.

    python -m benchmarks.bench_references --model DIRECTORY --save

Each engine runs in a process of its own: the bare library (one call for each picture), engine `genai`, and engine
`stepwise` with one picture and with several in flight. Figures are seconds of CPU time for each picture, because they
do not depend on what else runs on the machine, and private memory after the first picture. The model's quality does
not matter here: random weights of the same shape cost the same.
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
from benchmarks.results import Result
from ovserve.engines.protocol import Pixels, Work
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings

STEPS = 1  # a step costs the same each time
ENGINES = ("library", "genai", "stepwise")
TIMEOUT_S = 1800.0


def image(side: int, seed: int) -> Pixels:
    """Return noise: uint8 (side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def make_work(side: int, references: int, seed: int) -> Work:
    """Return a picture with so many references of its own size."""
    images = tuple(image(side, k) for k in range(references))
    return Work(
        job=str(seed),
        picture=0,
        mode="image2image" if images else "text2image",
        prompt="make it blue",
        negative_prompt="",
        width=side,
        height=side,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        strength=1.0,
        seed=seed,
        initial_image=images[0] if images else None,
        reference_images=images,
    )


def private_bytes() -> int:
    """Return the private memory of this process."""
    fields = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in fields if line.startswith("Private_"))


def run(name: str, directory: Path, side: int, most_references: int, reply: Connection) -> None:
    """Measure one engine and send a list of (figure, case, value); runs in a process of its own."""
    found: list[tuple[str, dict[str, Any], float]] = []
    settings = ModelSettings(
        name="model", path=directory, engine="genai" if name == "library" else name, streams=1, max_batch=4
    )
    started = time.process_time()
    make = _library(directory) if name == "library" else _engine(name, settings)
    make([make_work(side, 0, 0)])
    found.append(("cpu until the first picture", {}, time.process_time() - started))
    found.append(("private memory", {}, private_bytes()))
    limit = 1 if name == "library" else min(most_references, read_profile(settings).references)
    for references in range(limit + 1):
        for pictures in (1, 2) if name == "stepwise" and references < 2 else (1,):
            works = [make_work(side, references, seed) for seed in range(pictures)]
            make(works[:1])  # kernels of this shape
            began = time.process_time()
            make(works)
            case = {"references": references, "pictures in flight": pictures}
            found.append(("cpu for a picture", case, (time.process_time() - began) / pictures))
    reply.send(found)


def _library(directory: Path) -> Any:
    import openvino as ov
    import openvino_genai as og

    edits = og.Image2ImagePipeline(str(directory), "CPU")
    texts = og.Text2ImagePipeline(edits)
    texts.set_scheduler(og.Scheduler.from_config(directory / "scheduler" / "scheduler_config.json"))

    def make(works: list[Work]) -> None:
        for work in works:
            pipeline = texts if work.initial_image is None else edits
            images = [] if work.initial_image is None else [ov.Tensor(work.initial_image[None].copy())]
            pipeline.generate(
                work.prompt,
                *images,
                width=work.width,
                height=work.height,
                num_inference_steps=work.num_inference_steps,
                guidance_scale=work.guidance_scale,
                rng_seed=work.seed,
            )

    return make


def _engine(name: str, settings: ModelSettings) -> Any:
    from ovserve.engines.genai import GenaiEngine
    from ovserve.engines.stepwise.engine import StepwiseEngine

    kind: Any = GenaiEngine if name == "genai" else StepwiseEngine
    engine = kind(read_profile(settings), settings)
    engine.load(lambda _phase: None)

    def make(works: list[Work]) -> None:
        waiting, done, in_flight = list(works), 0, 0
        while done < len(works):
            while waiting and in_flight < engine.capacity:
                engine.admit(waiting.pop(0))
                in_flight += 1
            for outcome in engine.turn():
                if outcome.pixels is None:
                    raise RuntimeError(f"no picture: {outcome.error}")
                in_flight, done = in_flight - 1, done + 1

    return make


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument(
        "--weights", default="fp16", help="what the weights are stored in, for the result (%(default)s)"
    )
    parser.add_argument("--side_px", type=int, default=256, help="side of pictures and references (%(default)s)")
    parser.add_argument("--references", type=int, default=2, help="most references (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result(f"references-{options.weights}", metadata.collect(options.model))
    context = multiprocessing.get_context("spawn")
    for name in ENGINES:
        mine, theirs = context.Pipe()
        arguments = (name, options.model, options.side_px, options.references, theirs)
        process = context.Process(target=run, args=arguments)
        process.start()
        theirs.close()
        if not mine.poll(TIMEOUT_S):
            process.terminate()
            raise TimeoutError(f"{name} took longer than {TIMEOUT_S:.0f} s")
        for figure, case, value in mine.recv():
            unit = "bytes" if figure == "private memory" else "s"
            result.add(figure, [value], unit=unit, case={"engine": name, "weights": options.weights, **case})
            print(name, figure, case, f"{value:.4g} {unit}", flush=True)
        process.join()
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
