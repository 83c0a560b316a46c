"""Evaluate an exported model with openvino_genai: how often its pictures show what the prompts ask for.

A program reads the pictures (tests/reader.py). Prompts, source pictures and seeds follow from the test's name and the
case's number, so every model is given the same cases. Sources are drawn here; nothing of the training set is used.
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
from tests.reader import COLOURS, SHAPES, SIDE_PX, Figure, Scene, draw_scene, has_contrast, read_picture

Picture = npt.NDArray[np.uint8]
COLOUR_NAMES = tuple(COLOURS)
MIDDLE = SIDE_PX / 2  # sources are laid out on a square of SIDE_PX, like the compositions of the training set
MAX_SHIFT = 8.0 / SIDE_PX  # an object that moved less than this is in place; as a part of the picture's side
MAX_REST = 200 / SIDE_PX**2  # area of a removed object that may be left, as a part of the picture
SHEET_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Subject:
    """One object on a background: a shape, its colour, and a background colour with contrast to it."""

    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        """The prompt for it."""
        return f"{with_article(self.colour)} {self.shape} on {with_article(self.background)} background"


class Model:
    """The three pipelines of one exported model, with fixed steps and guidance."""

    def __init__(self, directory: Path, threads: int, steps: int, guidance_scale: float) -> None:
        properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.inpainting = openvino_genai.InpaintingPipeline(directory, "CPU", **properties)
        self.image_to_image = openvino_genai.Image2ImagePipeline(self.inpainting)
        self.text_to_image = openvino_genai.Text2ImagePipeline(self.inpainting)
        self.settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}

    def generate(self, prompt: str, seed: int) -> Picture:
        """Return a picture from a prompt (text to image)."""
        return self._copied(self.text_to_image.generate(prompt, rng_seed=seed, **self.settings))

    def edit(self, prompt: str, source: Picture, strength: float, seed: int) -> Picture:
        """Return an edit of a picture (image to image)."""
        result = self.image_to_image.generate(
            prompt, self._tensor(source), strength=strength, rng_seed=seed, **self.settings
        )
        return self._copied(result)

    def inpaint(self, prompt: str, source: Picture, mask: npt.NDArray[np.bool_], seed: int) -> Picture:
        """Return an inpainted picture at full strength; pixels outside the mask are pasted back, as the server does."""
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
        return np.array(result.data[0])  # a copy: the library reuses its buffer


class Tally:
    """Counts of correct results in one test, and the first pictures for a contact sheet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.right: dict[str, int] = {}
        self.cases = 0
        self.columns: list[list[Picture]] = []

    def add(self, pictures: list[Picture], **right: bool) -> None:
        """Count one case."""
        self.cases += 1
        for key, value in right.items():
            self.right[key] = self.right.get(key, 0) + bool(value)
        if self.cases <= SHEET_COLUMNS:
            self.columns.append(pictures)

    def figures(self) -> dict[str, float]:
        """Return the part (0..1) of the cases in which each property was right."""
        return {f"{self.name}: {key}": round(value / self.cases, 4) for key, value in self.right.items()}

    def rows(self) -> list[list[Picture]]:
        """Return the rows of a contact sheet, sources above results."""
        return [list(row) for row in zip(*self.columns, strict=True)]


def _random_subject(rng: random.Random) -> Subject:
    background = rng.choice(COLOUR_NAMES)
    colour = rng.choice([name for name in COLOUR_NAMES if has_contrast(name, background)])
    return Subject(colour, rng.choice(SHAPES), background)


def _other_colour(rng: random.Random, subject: Subject) -> str:
    names = [name for name in COLOUR_NAMES if name != subject.colour and has_contrast(name, subject.background)]
    return rng.choice(names)


def _other_shape(rng: random.Random, subject: Subject) -> str:
    return rng.choice([shape for shape in SHAPES if shape != subject.shape])


def _other_background(rng: random.Random, subject: Subject) -> str:
    names = [name for name in COLOUR_NAMES if name != subject.background and has_contrast(name, subject.colour)]
    return rng.choice(names)


def _shows(scene: Scene, subject: Subject, *, shape: bool = True) -> bool:
    found = scene.largest
    if found is None or scene.background != subject.background or found.colour != subject.colour:
        return False
    return not shape or found.shape == subject.shape


def _drawn(background: str, *figures: Figure) -> Picture:
    factor = PICTURE_PX / SIDE_PX
    return draw_scene(background, [figure.scaled(factor) for figure in figures], PICTURE_PX)


def _square(left: int, top: int, right: int, bottom: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((SIDE_PX, SIDE_PX), np.bool_)
    mask[top:bottom, left:right] = True
    factor = PICTURE_PX // SIDE_PX
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)


def test_single(model: Model, case: int, tally: Tally) -> None:
    """Test text to image with one object."""
    subject = _random_subject(random.Random(f"single/{case}"))
    picture = model.generate(subject.prompt, case)
    scene = read_picture(picture)
    found = scene.largest
    tally.add(
        [picture],
        background=scene.background == subject.background,
        colour=found is not None and found.colour == subject.colour,
        shape=found is not None and found.shape == subject.shape,
        one=len(scene.objects) == 1,
    )


def test_count(model: Model, case: int, tally: Tally, word: str, count: int) -> None:
    """Test text to image with two or three equal objects."""
    subject = _random_subject(random.Random(f"{word}/{case}"))
    background = with_article(subject.background)
    picture = model.generate(f"{word} {subject.colour} {plural(subject.shape)} on {background} background", case)
    tally.add([picture], count=len(read_picture(picture).objects) == count)


def test_edit(model: Model, case: int, tally: Tally, what: str, strength: float) -> None:
    """Test image to image: another colour, shape or background for a picture with one object."""
    rng = random.Random(f"{what}/{case}")
    subject = _random_subject(rng)
    x = MIDDLE + rng.choice([-14, 0, 14])
    source = _drawn(subject.background, Figure(subject.colour, subject.shape, x, MIDDLE, 34, rng.uniform(-0.1, 0.1)))
    wanted = {
        "recolour": Subject(_other_colour(rng, subject), subject.shape, subject.background),
        "reshape": Subject(subject.colour, _other_shape(rng, subject), subject.background),
        "background": Subject(subject.colour, subject.shape, _other_background(rng, subject)),
    }[what]
    picture = model.edit(wanted.prompt, source, strength, case)
    scene = read_picture(picture)
    found = scene.largest
    tally.add(
        [source, picture],
        obeyed=_shows(scene, wanted, shape=what != "recolour"),
        in_place=found is not None and abs(found.x / PICTURE_PX - x / SIDE_PX) < MAX_SHIFT,
    )


def test_inpaint_pair(model: Model, case: int, tally: Tally) -> None:
    """Test inpainting: replace the right one of two objects."""
    rng = random.Random(f"pair/{case}")
    left = _random_subject(rng)
    right = Subject(_other_colour(rng, left), rng.choice(SHAPES), left.background)
    wanted = Subject(_other_colour(rng, right), rng.choice(SHAPES), left.background)
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


def test_replace(model: Model, case: int, tally: Tally) -> None:
    """Test inpainting: replace the only object."""
    rng = random.Random(f"replace/{case}")
    subject = _random_subject(rng)
    wanted = Subject(_other_colour(rng, subject), rng.choice(SHAPES), subject.background)
    source = _drawn(subject.background, Figure(subject.colour, subject.shape, 64, 64, 30))
    picture = model.inpaint(wanted.prompt, source, _square(24, 24, 104, 104), case)
    tally.add([source, picture], obeyed=_shows(read_picture(picture), wanted))


def test_remove(model: Model, case: int, tally: Tally) -> None:
    """Test inpainting: replace the only object by background."""
    subject = _random_subject(random.Random(f"remove/{case}"))
    source = _drawn(subject.background, Figure(subject.colour, subject.shape, 64, 64, 30))
    picture = model.inpaint(f"{subject.background} background", source, _square(24, 24, 104, 104), case)
    left = [item for item in read_picture(picture).objects if item.area > MAX_REST * PICTURE_PX**2]
    tally.add([source, picture], gone=not left)


class RoundTrip:
    """A test of the autoencoder: encode and decode a drawn picture with the exported model."""

    def __init__(self, directory: Path, threads: int) -> None:
        core = openvino.Core()
        properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self._encoder, self._decoder = (
            core.compile_model(directory / part / "openvino_model.xml", "CPU", properties)
            for part in ("vae_encoder", "vae_decoder")
        )

    def __call__(self, _: Model, case: int, tally: Tally) -> None:
        """Test one picture, with an object as small as one of three in a row or larger."""
        rng = random.Random(f"round trip/{case}")
        subject = _random_subject(rng)
        figure = Figure(subject.colour, subject.shape, 64, 64, rng.uniform(14, 48), rng.uniform(-0.1, 0.1))
        source = _drawn(subject.background, figure)
        images = source.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        latents = self._encoder([images])[0][:, :4]
        decoded = self._decoder([latents])[0][0]
        picture = ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        scene = read_picture(picture)
        found = scene.largest
        tally.add(
            [source, picture],
            colour=found is not None and found.colour == subject.colour,
            shape=found is not None and found.shape == subject.shape,
            background=scene.background == subject.background,
        )


Test = Callable[[Model, int, Tally], None]


def tests(directory: Path, threads: int) -> dict[str, Test]:
    """Return every test by name."""
    table: dict[str, Test] = {
        "round trip": RoundTrip(directory, threads),
        "text to image": test_single,
        "count two": lambda model, case, tally: test_count(model, case, tally, "two", 2),
        "count three": lambda model, case, tally: test_count(model, case, tally, "three", 3),
        "inpaint one of a pair": test_inpaint_pair,
        "replace in place": test_replace,
        "remove": test_remove,
    }
    for what, strengths in (("recolour", (0.5, 0.7)), ("reshape", (0.7, 0.85)), ("background", (0.7, 0.85))):
        for strength in strengths:
            table[f"{what} at {strength}"] = _edit_test(what, strength)
    return table


def _edit_test(what: str, strength: float) -> Test:
    return lambda model, case, tally: test_edit(model, case, tally, what, strength)


def measure_times(model: Model, repeats: int = 15) -> dict[str, float]:
    """Return the median milliseconds of each task after a warm-up."""
    source = _drawn("blue", Figure("red", "circle", 64, 64, 34))
    prompt, mask = "a green circle on a blue background", _square(24, 24, 104, 104)
    tasks: dict[str, Callable[[], Picture]] = {
        "text to image, ms": lambda: model.generate(prompt, 1),
        "image to image at 0.7, ms": lambda: model.edit(prompt, source, 0.7, 1),
        "inpainting, ms": lambda: model.inpaint(prompt, source, mask, 1),
    }
    times = {}
    for name, task in tasks.items():
        task()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            task()
            taken.append((time.perf_counter() - began) * 1000)
        times[name] = round(statistics.median(taken), 1)
    return times


def compare(figures: dict[str, float], baseline: dict[str, float]) -> str:
    """Return a table of the figures and the baseline, with the number of figures that are worse."""
    shared = [name for name in figures if name in baseline]
    lines = [
        f"{name:<44} {baseline[name]:7.3f} {figures[name]:7.3f}{'  worse' if figures[name] < baseline[name] else ''}"
        for name in shared
    ]
    worse = sum(line.endswith("worse") for line in lines)
    return "\n".join([*lines, f"worse in {worse} of {len(shared)} figures"])


def main() -> None:
    """Parse the command line, run the tests, and write figures and contact sheets."""
    options = argument_parser(__doc__).parse_args()
    run_tests(options, tests(options.model, options.threads), measure_times)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that the tests of every world have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the exported model")
    parser.add_argument("--cases", type=int, default=200, help="cases of each test (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference; 0: the library's default")
    parser.add_argument("--tests", nargs="+", help="names of the tests to run; default: all")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--report", type=Path, help="JSON file for the figures")
    parser.add_argument("--baseline", type=Path, help="JSON file of another model's figures to compare with")
    return parser


def run_tests(
    options: argparse.Namespace, table: dict[str, Test], times_of: Callable[[Model], dict[str, float]]
) -> None:
    """Run the tests of the table, and write figures and contact sheets."""
    model = Model(options.model, options.threads, options.steps, options.guidance_scale)
    figures: dict[str, float] = {}
    for name, test in table.items():
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
    times = times_of(model)
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
