"""Measure models of full size on this machine: seconds of a step and of the rest of an edit, ready time and memory.

    python -m benchmarks.bench_sizes --model sd15=FOLDER@512 --model klein=FOLDER_1@512 --model klein=FOLDER_2@512 ...

Each model is given with the side of its pictures. A folder is a model's directory, or has the same model as `openvino`
(fp16 weights) and `int8`. Each side of the comparison, engine `stepwise` and the bare library, runs in a process of its
own; they take turns. The seconds of a step are the difference of an edit of MOST_STEPS and one of one step, divided by
the steps between them; the rest is what is left of the edit of one step. Steps, guidance and sizes are the model's own
defaults where a figure depends on them: whether a step has one row or two does.

Random weights of the same shapes take the same time (`peers/make_sd15.py`, `peers/make_sdxl.py`,
`peers/make_transformers.py`, `peers/compress.py`). The distance is that of the pictures with int8 weights from those
with fp16 weights, for the same seeds. With random weights the pictures are noise and the distance means little.

Several folders under one name are the same model with different numbers of blocks, as `blocks.json` in each folder
says. The figures of the model with all blocks are then extrapolated from the medians (`extrapolate.py`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import metadata
from benchmarks.bench_references import private_bytes
from benchmarks.extrapolate import EXTRAPOLATED, Blocks, describe_blocks, extrapolate, pool
from benchmarks.results import Case, Result
from ovserve.engines.protocol import Pixels, Work
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings

MOST_STEPS = 3
SIDES = ("stepwise", "library")
TIMEOUT_S = 1800.0
WEIGHTS = {"openvino": "fp16", "int8": "int8"}  # directory in a folder to its weights
TEXT = "text"  # kind of the text encoder's blocks
READY, STEP, REST, MEMORY = "ready", "step", "rest of an edit", "private memory"
FIGURES = (READY, STEP, REST, MEMORY)
DISTANCE, RATIO = "distance of the picture", "step, int8 over fp16"


@dataclass(frozen=True, slots=True)
class Model:
    """One model to measure.

    Attributes:
        name: of the model; models of one name differ in their blocks alone.
        directory: where it is.
        side_px: side of its pictures.
        weights: fp16, int8, or "as given".
        blocks: the blocks that it has; empty for a model that is measured in full.
        full: the blocks of the full model.
    """

    name: str
    directory: Path
    side_px: int
    weights: str
    blocks: Blocks
    full: Blocks

    @property
    def case(self) -> dict[str, str | int]:
        """The case of its figures, without the side of the comparison."""
        case: dict[str, str | int] = {"model": self.name, "weights": self.weights, "side_px": self.side_px}
        return case | ({"blocks": describe_blocks(self.blocks)} if self.blocks else {})


def find_models(argument: str, weights: Sequence[str] = tuple(WEIGHTS.values())) -> list[Model]:
    """Return the models that NAME=FOLDER@SIDE means, one for each kind of weights.

    Raises:
        ValueError: there is no model in the folder, or the argument is malformed.
    """
    name, _, rest = argument.partition("=")
    path, _, side_px = rest.rpartition("@")
    folder = Path(path)
    if not name or not path or not side_px.isdigit():
        raise ValueError(f"{argument!r} is not NAME=FOLDER@SIDE")
    depth = folder / "blocks.json"
    declared = json.loads(depth.read_text("utf-8")) if depth.is_file() else {"blocks": {}, "full": {}}
    places = {folder: "as given"} if (folder / "model_index.json").is_file() else {}
    places |= {folder / place: kind for place, kind in WEIGHTS.items() if kind in weights}
    found = [
        Model(name, place, int(side_px), kind, declared["blocks"], declared["full"])
        for place, kind in places.items()
        if (place / "model_index.json").is_file()
    ]
    if not found:
        raise ValueError(f"{folder}: no model_index.json in it, nor in {' or '.join(WEIGHTS)}")
    return found


def make_work(side_px: int, steps: int, seed: int, guidance_scale: float) -> Work:
    """Return an edit whose strength lets all steps run."""
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
        guidance_scale=guidance_scale,
        strength=1.0,
        seed=seed,
        initial_image=blocks.repeat(8, axis=0).repeat(8, axis=1),
    )


def run(side: str, model: Model, edits: int, reply: Connection) -> None:
    """Measure one side of the comparison; send (figure, value) pairs and the pictures. Runs in a process of its own."""
    settings = ModelSettings(name="model", path=model.directory, engine="stepwise")
    guidance_scale = read_profile(settings).defaults.guidance_scale
    began = time.perf_counter()
    make = _library(model.directory) if side == "library" else _engine(settings)
    found = [(READY, time.perf_counter() - began)]
    make(make_work(model.side_px, 1, 0, guidance_scale))  # kernels of this size
    pictures = []
    for seed in range(1, edits + 1):
        seconds = {}
        # Equal prompts and pictures would come from caches in the second edit, and only of one side.
        for place, steps in enumerate((1, MOST_STEPS)):
            work = make_work(model.side_px, steps, 2 * seed + place, guidance_scale)
            began = time.perf_counter()
            picture = make(work)
            seconds[steps] = time.perf_counter() - began
        pictures.append(picture)
        step = (seconds[MOST_STEPS] - seconds[1]) / (MOST_STEPS - 1)
        found += [(STEP, step), (REST, seconds[1] - step)]
    found.append((MEMORY, private_bytes()))
    reply.send((found, pictures))


def _library(directory: Path) -> Any:
    import openvino as ov
    import openvino_genai as og

    pipeline = og.Image2ImagePipeline(str(directory), "CPU")

    def make(work: Work) -> Pixels:
        assert work.initial_image is not None
        found = pipeline.generate(
            work.prompt,
            ov.Tensor(np.ascontiguousarray(work.initial_image[None])),
            num_inference_steps=work.num_inference_steps,
            guidance_scale=work.guidance_scale,
            strength=work.strength,
            rng_seed=work.seed,
        )
        picture: Pixels = np.array(found.data[0])
        return picture

    return make


def _engine(settings: ModelSettings) -> Any:
    from ovserve.engines.stepwise.engine import StepwiseEngine

    engine = StepwiseEngine(read_profile(settings), settings)
    engine.load(lambda _phase: None)

    def make(work: Work) -> Pixels:
        engine.admit(work)
        while not (outcomes := engine.turn()):
            pass
        if outcomes[0].pixels is None:
            raise RuntimeError(f"no picture: {outcomes[0].error}")
        return outcomes[0].pixels

    return make


def measure(result: Result, model: Model, side: str, edits: int) -> list[Pixels]:
    """Add the figures of one side of the comparison; return the pictures, one for each seed.

    Raises:
        RuntimeError: the process took too long, or ended without figures.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(side, model, edits, there))
    process.start()
    there.close()
    try:
        if not here.poll(TIMEOUT_S):
            raise RuntimeError(f"{model.directory}: {side} took more than {TIMEOUT_S:g} s")
        found, pictures = here.recv()
    except EOFError:
        raise RuntimeError(f"{model.directory}: the process of {side} ended without figures") from None
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()
    for figure, value in found:
        result.add(figure, [value], unit="bytes" if figure == MEMORY else "s", case=model.case | {"side": side})
    return list(pictures)


def measure_all(result: Result, models: Sequence[Model], edits: int) -> None:
    """Add the figures of all models, and the distance of the pictures with int8 weights from those with fp16.

    A process that fails is listed in the metadata under `skipped`, and the others are measured.
    """
    from benchmarks.bench_quality import decibels

    pictures: dict[tuple[str, str], list[Pixels]] = {}  # name and blocks of a model to its pictures with fp16 weights
    for model in models:
        for side in SIDES:
            case = model.case | {"side": side}
            try:
                made = measure(result, model, side, edits)
            except RuntimeError as error:
                print(error, flush=True)
                result.metadata.setdefault("skipped", []).append(f"{case}: {error}")
                continue
            print(case, *(f"{figure} {values_of(result, figure, case)}" for figure in FIGURES), flush=True)
            key = (model.name, describe_blocks(model.blocks))
            if side == "stepwise" and model.weights == "fp16":
                pictures[key] = made
            elif side == "stepwise" and key in pictures:
                distances = [decibels(first, second) for first, second in zip(pictures[key], made, strict=True)]
                result.add(DISTANCE, distances, unit="dB", better="none", case=case)


def values_of(result: Result, figure: str, case: Case) -> tuple[float, ...]:
    """Return the values of a figure in exactly this case; empty if it was not measured."""
    return next((series.values for series in result.series if (series.name, series.case) == (figure, case)), ())


def add_full_depth(result: Result, models: Sequence[Model]) -> None:
    """Add the extrapolated figures of models that were measured with few blocks: one value each, without an interval.

    The text encoder runs before the steps, so its blocks do not count for a step, and only they count for the rest.
    Figures of which a depth was not measured are left out. So is a figure that would be smaller than a measured one:
    more blocks do not take less, so the depths differ by less than the noise. The metadata names it under `skipped`.

    Raises:
        ValueError: the depths of a model do not tell the kinds of its blocks apart.
    """
    for name, weights in dict.fromkeys((model.name, model.weights) for model in models if model.blocks):
        depths = [model for model in models if (model.name, model.weights) == (name, weights)]
        full = depths[0].full
        kinds = {STEP: [kind for kind in full if kind != TEXT], REST: [TEXT]}
        for side in SIDES:
            case = depths[0].case | {"blocks": f"{EXTRAPOLATED} to {describe_blocks(full)}", "side": side}
            for figure in FIGURES:
                measured = [(model.blocks, values_of(result, figure, model.case | {"side": side})) for model in depths]
                if len(depths) == 1 or not all(values for _, values in measured):
                    continue
                counted = {kind: full[kind] for kind in kinds.get(figure, list(full))}
                points = pool(measured, list(counted))
                value = extrapolate(points, counted)
                if value < max(there for _, there in points):
                    skipped = f"{case}: {figure} is {value:.4g}, less than with fewer blocks"
                    result.metadata.setdefault("skipped", []).append(skipped)
                    continue
                result.add(figure, [value], unit="bytes" if figure == MEMORY else "s", case=case)


def check_depths(models: Sequence[Model]) -> None:
    """Check before the measurement that the full depth can be extrapolated from the given ones.

    Raises:
        ValueError: the depths of a model do not tell the kinds of its blocks apart.
    """
    rehearsal = Result("sizes")
    for model in models:
        for side in SIDES:
            for figure in FIGURES:
                rehearsal.add(figure, [0.0], case=model.case | {"side": side})
    add_full_depth(rehearsal, models)


def add_ratios(result: Result) -> None:
    """Add the seconds of a step with int8 weights over those with fp16 weights, for each pair of edits."""
    for series in result.select(STEP, weights="int8"):
        case = series.case | {"weights": "fp16"}
        for other in (other for other in result.select(STEP, weights="fp16") if other.case == case):
            # A process that failed has left out values of one of them.
            ratios = [first / second for first, second in zip(series.values, other.values, strict=False)]
            result.add(RATIO, ratios, unit="", better="none", case=series.case)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER@SIDE")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS.values(), default=[*WEIGHTS.values()])
    parser.add_argument("--edits", type=int, default=3, help="pairs of edits in a process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    models = [model for each in options.model for model in find_models(each, options.weights)]
    check_depths(models)
    result = Result("sizes", metadata.collect())
    for _ in range(options.rounds):
        measure_all(result, models, options.edits)
    add_full_depth(result, models)
    add_ratios(result)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
