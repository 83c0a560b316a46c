"""Measures an exported model with openvino_genai: what the numpy reader sees of what was asked for, on held-out prompts.

Every prompt, source picture and seed follows from the test's name and the case's number, so two models get the same questions.
The sources are drawn, so nothing of the training set is read.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import openvino_genai

from scripts.builtin_model.captions import plural, with_article
from scripts.builtin_model.scenes import PICTURE_PX
from scripts.builtin_model.sheets import save_sheet
from tests.reader import COLOURS, SHAPES, SIDE_PX, Figure, Scene, draw_scene, read_picture, tell_apart

Picture = npt.NDArray[np.uint8]
COLOUR_NAMES = tuple(COLOURS)
MIDDLE = SIDE_PX / 2  # sources are laid out on a square of SIDE_PX, like the compositions of the training set
IN_PLACE = 8.0 / SIDE_PX  # how far an object may move and still be in place, as a part of the picture's side
SPECK = 200 / SIDE_PX**2  # what may be left of a removed object, as a part of the picture
SHEET_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Look:
    """A colour, a shape and a background that can be told apart."""

    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        """What to ask for to get it."""
        return f"{with_article(self.colour)} {self.shape} on {with_article(self.background)} background"


class Model:
    """The three pipelines of one exported model, with its own defaults for steps and guidance."""

    def __init__(self, directory: Path, threads: int, steps: int, guidance_scale: float) -> None:
        properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.inpainting = openvino_genai.InpaintingPipeline(directory, "CPU", **properties)
        self.image_to_image = openvino_genai.Image2ImagePipeline(self.inpainting)
        self.text_to_image = openvino_genai.Text2ImagePipeline(self.inpainting)
        self.settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}

    def draw(self, prompt: str, seed: int) -> Picture:
        """Text to image."""
        return self._copied(self.text_to_image.generate(prompt, rng_seed=seed, **self.settings))

    def edit(self, prompt: str, source: Picture, strength: float, seed: int) -> Picture:
        """Image to image."""
        result = self.image_to_image.generate(
            prompt, self._tensor(source), strength=strength, rng_seed=seed, **self.settings
        )
        return self._copied(result)

    def inpaint(self, prompt: str, source: Picture, mask: npt.NDArray[np.bool_], seed: int) -> Picture:
        """Inpainting at full strength; pixels outside the mask are pasted back, as the server does."""
        white = np.repeat(mask[..., None], 3, axis=2) * np.uint8(255)
        result = self.inpainting.generate(
            prompt, self._tensor(source), self._tensor(white), strength=1.0, rng_seed=seed, **self.settings
        )
        return np.where(mask[..., None], self._copied(result), source)

    @staticmethod
    def _tensor(picture: Picture) -> openvino.Tensor:
        return openvino.Tensor(np.ascontiguousarray(picture[None]))

    @staticmethod
    def _copied(result: Any) -> Picture:
        return np.array(result.data[0])  # the library reuses its buffer


class Tally:
    """Counts of what was right, for one test, with the first pictures for a contact sheet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.right: dict[str, int] = {}
        self.cases = 0
        self.columns: list[list[Picture]] = []

    def add(self, pictures: list[Picture], **right: bool) -> None:
        """Note one case."""
        self.cases += 1
        for key, value in right.items():
            self.right[key] = self.right.get(key, 0) + bool(value)
        if self.cases <= SHEET_COLUMNS:
            self.columns.append(pictures)

    def figures(self) -> dict[str, float]:
        """The part (0..1) of the cases in which each thing was right."""
        return {f"{self.name}: {key}": round(value / self.cases, 4) for key, value in self.right.items()}

    def rows(self) -> list[list[Picture]]:
        """Rows of a contact sheet: sources above results."""
        return [list(row) for row in zip(*self.columns, strict=True)]


def _look(rng: random.Random) -> Look:
    background = rng.choice(COLOUR_NAMES)
    colour = rng.choice([name for name in COLOUR_NAMES if tell_apart(name, background)])
    return Look(colour, rng.choice(SHAPES), background)


def _other_colour(rng: random.Random, look: Look) -> str:
    return rng.choice([name for name in COLOUR_NAMES if name != look.colour and tell_apart(name, look.background)])


def _other_shape(rng: random.Random, look: Look) -> str:
    return rng.choice([shape for shape in SHAPES if shape != look.shape])


def _other_background(rng: random.Random, look: Look) -> str:
    return rng.choice([name for name in COLOUR_NAMES if name != look.background and tell_apart(name, look.colour)])


def _shows(scene: Scene, look: Look, *, shape: bool = True) -> bool:
    found = scene.largest
    if found is None or scene.background != look.background or found.colour != look.colour:
        return False
    return not shape or found.shape == look.shape


def _drawn(background: str, *figures: Figure) -> Picture:
    factor = PICTURE_PX / SIDE_PX
    return draw_scene(background, [figure.scaled(factor) for figure in figures], PICTURE_PX)


def _square(left: int, top: int, right: int, bottom: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((SIDE_PX, SIDE_PX), np.bool_)
    mask[top:bottom, left:right] = True
    factor = PICTURE_PX // SIDE_PX
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_single(model: Model, case: int, tally: Tally) -> None:
    """Text to image, one object."""
    look = _look(random.Random(f"single/{case}"))
    picture = model.draw(look.prompt, case)
    scene = read_picture(picture)
    found = scene.largest
    tally.add(
        [picture],
        background=scene.background == look.background,
        colour=found is not None and found.colour == look.colour,
        shape=found is not None and found.shape == look.shape,
        one=len(scene.objects) == 1,
    )


def draw_count(model: Model, case: int, tally: Tally, word: str, count: int) -> None:
    """Text to image, two or three alike."""
    look = _look(random.Random(f"{word}/{case}"))
    background = with_article(look.background)
    picture = model.draw(f"{word} {look.colour} {plural(look.shape)} on {background} background", case)
    tally.add([picture], count=len(read_picture(picture).objects) == count)


def edit_single(model: Model, case: int, tally: Tally, what: str, strength: float) -> None:
    """Image to image: another colour, shape or background of a picture with one object."""
    rng = random.Random(f"{what}/{case}")
    look = _look(rng)
    x = MIDDLE + rng.choice([-14, 0, 14])
    source = _drawn(look.background, Figure(look.colour, look.shape, x, MIDDLE, 34, rng.uniform(-0.1, 0.1)))
    wanted = {
        "recolour": Look(_other_colour(rng, look), look.shape, look.background),
        "reshape": Look(look.colour, _other_shape(rng, look), look.background),
        "background": Look(look.colour, look.shape, _other_background(rng, look)),
    }[what]
    picture = model.edit(wanted.prompt, source, strength, case)
    scene = read_picture(picture)
    found = scene.largest
    tally.add(
        [source, picture],
        obeyed=_shows(scene, wanted, shape=what != "recolour"),
        in_place=found is not None and abs(found.x / PICTURE_PX - x / SIDE_PX) < IN_PLACE,
    )


def inpaint_pair(model: Model, case: int, tally: Tally) -> None:
    """Inpainting: another object in place of the right one of two."""
    rng = random.Random(f"pair/{case}")
    left = _look(rng)
    right = Look(_other_colour(rng, left), rng.choice(SHAPES), left.background)
    wanted = Look(_other_colour(rng, right), rng.choice(SHAPES), left.background)
    figures = [Figure(left.colour, left.shape, 34, 64, 24), Figure(right.colour, right.shape, 94, 64, 24)]
    source = _drawn(left.background, *figures)
    prompt = f"{with_article(left.colour)} {left.shape} and {wanted.prompt}"
    picture = model.inpaint(prompt, source, _square(64, 28, 126, 100), case)
    scene = read_picture(picture)
    new = max((item for item in scene.objects if item.x > PICTURE_PX / 2), key=lambda item: item.area, default=None)
    tally.add(
        [source, picture],
        colour=new is not None and new.colour == wanted.colour,
        shape=new is not None and new.shape == wanted.shape,
        background=scene.background == left.background,
    )


def inpaint_replace(model: Model, case: int, tally: Tally) -> None:
    """Inpainting: another object in place of the only one."""
    rng = random.Random(f"replace/{case}")
    look = _look(rng)
    wanted = Look(_other_colour(rng, look), rng.choice(SHAPES), look.background)
    source = _drawn(look.background, Figure(look.colour, look.shape, 64, 64, 30))
    picture = model.inpaint(wanted.prompt, source, _square(24, 24, 104, 104), case)
    tally.add([source, picture], obeyed=_shows(read_picture(picture), wanted))


def inpaint_remove(model: Model, case: int, tally: Tally) -> None:
    """Inpainting: nothing but background in place of an object."""
    look = _look(random.Random(f"remove/{case}"))
    source = _drawn(look.background, Figure(look.colour, look.shape, 64, 64, 30))
    picture = model.inpaint(f"{look.background} background", source, _square(24, 24, 104, 104), case)
    left = [item for item in read_picture(picture).objects if item.area > SPECK * PICTURE_PX**2]
    tally.add([source, picture], gone=not left)


class RoundTrip:
    """The autoencoder alone: a drawn picture through the exported encoder and decoder."""

    def __init__(self, directory: Path, threads: int) -> None:
        core = openvino.Core()
        properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self._encoder, self._decoder = (
            core.compile_model(directory / part / "openvino_model.xml", "CPU", properties)
            for part in ("vae_encoder", "vae_decoder")
        )

    def __call__(self, _: Model, case: int, tally: Tally) -> None:
        """One picture; sizes down to what three in a row leave to each."""
        rng = random.Random(f"round trip/{case}")
        look = _look(rng)
        figure = Figure(look.colour, look.shape, 64, 64, rng.uniform(14, 48), rng.uniform(-0.1, 0.1))
        source = _drawn(look.background, figure)
        images = source.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        latents = self._encoder([images])[0][:, :4]
        decoded = self._decoder([latents])[0][0]
        picture = ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        scene = read_picture(picture)
        found = scene.largest
        tally.add(
            [source, picture],
            colour=found is not None and found.colour == look.colour,
            shape=found is not None and found.shape == look.shape,
            background=scene.background == look.background,
        )


Test = Callable[[Model, int, Tally], None]


def tests(directory: Path, threads: int) -> dict[str, Test]:
    """Every test by name."""
    table: dict[str, Test] = {
        "round trip": RoundTrip(directory, threads),
        "text to image": draw_single,
        "count two": lambda model, case, tally: draw_count(model, case, tally, "two", 2),
        "count three": lambda model, case, tally: draw_count(model, case, tally, "three", 3),
        "inpaint one of a pair": inpaint_pair,
        "replace in place": inpaint_replace,
        "remove": inpaint_remove,
    }
    for what, strengths in (("recolour", (0.5, 0.7)), ("reshape", (0.7, 0.85)), ("background", (0.7, 0.85))):
        for strength in strengths:
            table[f"{what} at {strength}"] = _edit_test(what, strength)
    return table


def _edit_test(what: str, strength: float) -> Test:
    return lambda model, case, tally: edit_single(model, case, tally, what, strength)


def measure_times(model: Model, repeats: int = 15) -> dict[str, float]:
    """Median milliseconds of each task, warmed up."""
    source = _drawn("blue", Figure("red", "circle", 64, 64, 34))
    prompt, mask = "a green circle on a blue background", _square(24, 24, 104, 104)
    tasks: dict[str, Callable[[], Picture]] = {
        "text to image, ms": lambda: model.draw(prompt, 1),
        "image to image at 0.7, ms": lambda: model.edit(prompt, source, 0.7, 1),
        "inpainting, ms": lambda: model.inpaint(prompt, source, mask, 1),
    }
    times = {}
    for name, task in tasks.items():
        task()
        taken = []
        for _ in range(repeats):
            begun = time.perf_counter()
            task()
            taken.append((time.perf_counter() - begun) * 1000)
        times[name] = round(statistics.median(taken), 1)
    return times


def compare(figures: dict[str, float], baseline: dict[str, float]) -> str:
    """A table of both, and whether the new one is nowhere worse."""
    shared = [name for name in figures if name in baseline]
    lines = [
        f"{name:<44} {baseline[name]:7.3f} {figures[name]:7.3f}{'  worse' if figures[name] < baseline[name] else ''}"
        for name in shared
    ]
    worse = sum(line.endswith("worse") for line in lines)
    return "\n".join([*lines, f"worse in {worse} of {len(shared)} figures"])


def main() -> None:
    """Parse the command line, run the tests, write figures and contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the exported model")
    parser.add_argument("--cases", type=int, default=200, help="of each test")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0, help="of one inference; 0: the library's choice")
    parser.add_argument("--tests", nargs="+", help="names of the tests to run; all by default")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--report", type=Path, help="JSON file for the figures")
    parser.add_argument("--baseline", type=Path, help="JSON file of another model's figures, to compare with")
    options = parser.parse_args()
    model = Model(options.model, options.threads, options.steps, options.guidance_scale)
    figures: dict[str, float] = {}
    for name, test in tests(options.model, options.threads).items():
        if options.tests and name not in options.tests:
            continue
        tally = Tally(name)
        for case in range(options.cases):
            test(model, case, tally)
        figures.update(tally.figures())
        print(
            f"{name}: " + ", ".join(f"{key} {value / tally.cases:.3f}" for key, value in tally.right.items()),
            flush=True,
        )
        if options.sheets:
            save_sheet(options.sheets / f"{name.replace(' ', '_')}.png", tally.rows())
    times = measure_times(model)
    print(times)
    if options.report:
        document = {
            "cases": options.cases,
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "figures": figures,
            "times": times,
        }
        options.report.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if options.baseline:
        print(compare(figures, json.loads(options.baseline.read_text("utf-8"))["figures"]))


if __name__ == "__main__":
    main()
