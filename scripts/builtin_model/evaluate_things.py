"""Evaluate an exported model of the world "things" with openvino_genai, with a judge that shares nothing with it.

Prompts, source pictures and seeds follow from the test's name and the case's number, so every model is given the same
cases. The first figures are those of the judge itself: how often it is right on the drawings and on round trips.
"""

from __future__ import annotations

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

from scripts.builtin_model.captions import with_article
from scripts.builtin_model.evaluate import Model, Picture, Tally, Test, argument_parser, run_tests
from scripts.builtin_model.thing_judge import Judge, parts_of
from scripts.builtin_model.thing_pictures import load_sprites
from scripts.builtin_model.thing_scenes import (
    COLOURS,
    GRID_PX,
    LANDSCAPES,
    PICTURE_PX,
    SIZES_PX,
    Composition,
    Placed,
    Sprites,
    draw_backdrop,
    draw_composition,
)
from scripts.builtin_model.things import find_thing, thing_names

__all__ = ["ThingTests"]

MAX_SHIFT_PX = GRID_PX // 2 + 8  # a thing that moved less than this is in place: to the nearest place of the grid
MAX_REST = 0.01  # of the picture: what may be left of a removed thing
MIDDLE = PICTURE_PX // 2
WORDS = {"meadow": "in a meadow", "beach": "at the beach", "night": "at night"}
EMPTY_WORDS = {"meadow": "an empty meadow", "beach": "an empty beach", "night": "night sky"}


@dataclass(frozen=True, slots=True)
class Subject:
    """Things on a background, with a word for each thing: its name, or another word for it."""

    names: tuple[str, ...]
    words: tuple[str, ...]
    background: str

    @property
    def prompt(self) -> str:
        """The prompt for it."""
        things = " and ".join(with_article(word) for word in self.words)
        if self.background in LANDSCAPES:
            return f"{things} {WORDS[self.background]}" if things else EMPTY_WORDS[self.background]
        colour = self.background
        return f"{things} on {with_article(colour)} background" if things else f"{colour} background"

    def drawn(self, sprites: Sprites, side: int, centres: tuple[tuple[int, int], ...] = ((MIDDLE, MIDDLE),)) -> Picture:
        """Return a picture of it."""
        placed = tuple(Placed(name, x, y, side) for name, (x, y) in zip(self.names, centres, strict=True))
        return draw_composition(Composition("one", self.background, placed), sprites)


def random_subject(rng: random.Random, count: int = 1) -> Subject:
    """Return different things with any word for each, on a background."""
    names = rng.sample(thing_names(), count)
    background = rng.choice(LANDSCAPES) if rng.random() < 0.25 else rng.choice(list(COLOURS))
    return Subject(tuple(names), tuple(rng.choice(find_thing(name).words) for name in names), background)


def other_thing(rng: random.Random, subject: Subject) -> Subject:
    """Return the same with another thing as its last."""
    name = rng.choice([name for name in thing_names() if name not in subject.names])
    word = rng.choice(find_thing(name).words)
    return Subject((*subject.names[:-1], name), (*subject.words[:-1], word), subject.background)


class ThingTests:
    """The tests, with the judge and the drawings."""

    def __init__(self, sprites: Sprites) -> None:
        self.sprites, self.judge = sprites, Judge(sprites)

    def table(self, directory: Path, threads: int) -> dict[str, Test]:
        """Return every test by name."""
        table: dict[str, Test] = {
            "judge": self.read_drawing,
            "round trip": RoundTrip(self, directory, threads),
            "text to image": self.single,
            "two things": self.pair,
            "replace with a mask": self.replace_masked,
            "add with a mask": self.add_masked,
            "remove with a mask": self.remove_masked,
        }
        for strength in (0.7, 0.85):
            table[f"replace at {strength}"] = self._edit_test(self.replace, strength)
            table[f"background at {strength}"] = self._edit_test(self.change_background, strength)
        return table

    @staticmethod
    def _edit_test(test: Callable[[Model, int, Tally, float], None], strength: float) -> Test:
        return lambda model, case, tally: test(model, case, tally, strength)

    def shows(self, picture: Picture, name: str, columns: slice = slice(None)) -> bool:
        """Return whether a picture shows this thing in these columns."""
        seen = self.judge.read_thing(picture, columns)
        return seen is not None and seen.name == name

    def _is_in_place(self, before: Picture, after: Picture) -> bool:
        was, now = self.judge.read_thing(before), self.judge.read_thing(after)
        return was is not None and now is not None and max(abs(was.x - now.x), abs(was.y - now.y)) < MAX_SHIFT_PX

    def read_drawing(self, _: Model, case: int, tally: Tally) -> None:
        """Test the judge on a drawing."""
        rng = random.Random(f"judge/{case}")
        subject = random_subject(rng)
        centre = (rng.randint(80, 176), rng.randint(80, 176))
        picture = subject.drawn(self.sprites, rng.randint(80, 150), (centre,))
        tally.add(
            [picture],
            thing=self.shows(picture, subject.names[0]),
            background=self.judge.read_background(picture) == subject.background,
        )

    def single(self, model: Model, case: int, tally: Tally) -> None:
        """Test text to image with one thing."""
        subject = random_subject(random.Random(f"single/{case}"))
        picture = model.generate(subject.prompt, case)
        tally.add(
            [picture],
            thing=self.shows(picture, subject.names[0]),
            background=self.judge.read_background(picture) == subject.background,
        )

    def pair(self, model: Model, case: int, tally: Tally) -> None:
        """Test text to image with two things, the first on the left."""
        subject = random_subject(random.Random(f"pair/{case}"), 2)
        picture = model.generate(subject.prompt, case)
        right = [self.shows(picture, name, columns) for name, columns in zip(subject.names, parts_of(2), strict=True)]
        tally.add([picture], both=all(right), one=any(right))

    def replace(self, model: Model, case: int, tally: Tally, strength: float) -> None:
        """Test image to image: another thing in the place of the only one."""
        rng = random.Random(f"replace/{case}")
        subject = random_subject(rng)
        centre = (MIDDLE + rng.randint(-40, 40), MIDDLE + rng.randint(-40, 40))
        source = subject.drawn(self.sprites, 128, (centre,))
        wanted = other_thing(rng, subject)
        picture = model.edit(wanted.prompt, source, strength, case)
        tally.add(
            [source, picture],
            thing=self.shows(picture, wanted.names[0]),
            background=self.judge.read_background(picture) == wanted.background,
            in_place=self._is_in_place(source, picture),
        )

    def change_background(self, model: Model, case: int, tally: Tally, strength: float) -> None:
        """Test image to image: another background behind the same thing."""
        rng = random.Random(f"background/{case}")
        subject = random_subject(rng)
        source = subject.drawn(self.sprites, 128)
        background = rng.choice([name for name in (*COLOURS, *LANDSCAPES) if name != subject.background])
        wanted = Subject(subject.names, subject.words, background)
        picture = model.edit(wanted.prompt, source, strength, case)
        tally.add(
            [source, picture],
            thing=self.shows(picture, wanted.names[0]),
            background=self.judge.read_background(picture) == background,
        )

    def replace_masked(self, model: Model, case: int, tally: Tally) -> None:
        """Test inpainting: another thing in the place of the right one of two."""
        rng = random.Random(f"replace masked/{case}")
        subject = random_subject(rng, 2)
        source = subject.drawn(self.sprites, 128, ((64, MIDDLE), (192, MIDDLE)))
        wanted = other_thing(rng, subject)
        picture = model.inpaint(wanted.prompt, source, _hole(132, 64, 252, 192), case)
        tally.add([source, picture], thing=self.shows(picture, wanted.names[1], parts_of(2)[1]))

    def add_masked(self, model: Model, case: int, tally: Tally) -> None:
        """Test inpainting: a second thing on the right."""
        rng = random.Random(f"add masked/{case}")
        wanted = random_subject(rng, 2)
        subject = Subject(wanted.names[:1], wanted.words[:1], wanted.background)
        source = subject.drawn(self.sprites, 128, ((64, MIDDLE),))
        picture = model.inpaint(wanted.prompt, source, _hole(132, 64, 252, 192), case)
        tally.add([source, picture], thing=self.shows(picture, wanted.names[1], parts_of(2)[1]))

    def remove_masked(self, model: Model, case: int, tally: Tally) -> None:
        """Test inpainting: background in the place of the only thing."""
        rng = random.Random(f"remove/{case}")
        subject = random_subject(rng)
        source = subject.drawn(self.sprites, 128)
        hole = _hole(56, 56, 200, 200)
        picture = model.inpaint(Subject((), (), subject.background).prompt, source, hole, case)
        rest = self.judge.foreground(picture) & ~self.judge.foreground(draw_backdrop(subject.background))
        tally.add([source, picture], gone=bool((rest & hole).mean() < MAX_REST))

    def times(self, model: Model, repeats: int = 9) -> dict[str, float]:
        """Return the median milliseconds of each task after a warm-up."""
        source = Subject(("cat",), ("cat",), "blue").drawn(self.sprites, 128)
        prompt, hole = "a dog on a blue background", _hole(56, 56, 200, 200)
        tasks: dict[str, Callable[[], Picture]] = {
            "text to image, ms": lambda: model.generate(prompt, 1),
            "image to image at 0.7, ms": lambda: model.edit(prompt, source, 0.7, 1),
            "inpainting, ms": lambda: model.inpaint(prompt, source, hole, 1),
        }
        medians = {}
        for name, task in tasks.items():
            task()
            taken = []
            for _ in range(repeats):
                began = time.perf_counter()
                task()
                taken.append((time.perf_counter() - began) * 1000)
            medians[name] = round(statistics.median(taken), 1)
        return medians


class RoundTrip:
    """A test of the autoencoder: encode and decode a drawing with the exported model."""

    def __init__(self, all_tests: ThingTests, directory: Path, threads: int) -> None:
        self._tests = all_tests
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self._encoder, self._decoder = (
            openvino.Core().compile_model(directory / part / "openvino_model.xml", "CPU", properties)
            for part in ("vae_encoder", "vae_decoder")
        )

    def __call__(self, _: Model, case: int, tally: Tally) -> None:
        """Test one picture."""
        rng = random.Random(f"round trip/{case}")
        subject = random_subject(rng)
        source = subject.drawn(self._tests.sprites, rng.choice(list(SIZES_PX.values())))
        images = source.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        parameters = self._encoder([images])[0]
        decoded = self._decoder([parameters[:, : parameters.shape[1] // 2]])[0][0]
        picture = ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        tally.add(
            [source, picture],
            thing=self._tests.shows(picture, subject.names[0]),
            background=self._tests.judge.read_background(picture) == subject.background,
        )


def _hole(left: int, top: int, right: int, bottom: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((PICTURE_PX, PICTURE_PX), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def main() -> None:
    """Parse the command line, run the tests, and write figures and contact sheets."""
    parser = argument_parser(__doc__)
    parser.add_argument("--drawings", type=Path, required=True, help="things.png of the training")
    options = parser.parse_args()
    all_tests = ThingTests(load_sprites(options.drawings))
    run_tests(options, all_tests.table(options.model, options.threads), all_tests.times)


if __name__ == "__main__":
    main()
