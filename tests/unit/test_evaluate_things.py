"""The evaluation of things counts right pictures as right, and wrong ones as wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.builtin_model.evaluate import Picture, Tally
from scripts.builtin_model.evaluate_things import MIDDLE, Subject, ThingTests, other_thing, random_subject
from scripts.builtin_model.thing_pictures import load_sprites
from scripts.builtin_model.thing_scenes import draw_backdrop

CASES = 6
PAIR = ((64, MIDDLE), (192, MIDDLE))


class Painter:
    """Stands in for a model: its answer to everything is one picture, pasted into the source where there is a mask."""

    def __init__(self) -> None:
        self.answer: Picture = draw_backdrop("white")
        self.prompts: list[str] = []

    def generate(self, prompt: str, seed: int) -> Picture:
        self.prompts.append(prompt)
        return self.answer

    def edit(self, prompt: str, source: Picture, strength: float, seed: int) -> Picture:
        return self.generate(prompt, seed)

    def inpaint(self, prompt: str, source: Picture, mask: Any, seed: int) -> Picture:
        return np.where(mask[..., None], self.generate(prompt, seed), source)


@pytest.fixture(scope="module")
def tests() -> ThingTests:
    return ThingTests(load_sprites(Path("tests/data/things.png")))


def single(tests: ThingTests, case: int) -> tuple[Subject, Picture]:
    subject = random_subject(random.Random(f"single/{case}"))
    return subject, subject.drawn(tests.sprites, 128)


def pair(tests: ThingTests, case: int) -> tuple[Subject, Picture]:
    subject = random_subject(random.Random(f"pair/{case}"), 2)
    return subject, subject.drawn(tests.sprites, 128, PAIR)


def replaced(tests: ThingTests, case: int) -> tuple[Subject, Picture]:
    rng = random.Random(f"replace/{case}")
    subject = random_subject(rng)
    centre = (MIDDLE + rng.randint(-40, 40), MIDDLE + rng.randint(-40, 40))
    wanted = other_thing(rng, subject)
    return wanted, wanted.drawn(tests.sprites, 128, (centre,))


def replaced_masked(tests: ThingTests, case: int) -> tuple[Subject, Picture]:
    rng = random.Random(f"replace masked/{case}")
    wanted = other_thing(rng, random_subject(rng, 2))
    return wanted, wanted.drawn(tests.sprites, 128, PAIR)


def added(tests: ThingTests, case: int) -> tuple[Subject, Picture]:
    subject = random_subject(random.Random(f"add masked/{case}"), 2)
    return subject, subject.drawn(tests.sprites, 128, PAIR)


def removed(tests: ThingTests, case: int) -> tuple[Subject, Picture]:
    subject = random_subject(random.Random(f"remove/{case}"))
    return Subject((), (), subject.background), draw_backdrop(subject.background)


ANSWERS: dict[str, Callable[[ThingTests, int], tuple[Subject, Picture]]] = {
    "text to image": single,
    "two things": pair,
    "replace at 0.7": replaced,
    "replace with a mask": replaced_masked,
    "add with a mask": added,
    "remove with a mask": removed,
}


def tally_of(tests: ThingTests, name: str, painter: Painter, cases: int, *, shift: int = 0) -> Tally:
    """Run a test on the right answers, or with `shift` on those of other cases."""
    test = {
        "text to image": tests.single,
        "two things": tests.pair,
        "replace at 0.7": lambda model, case, tally: tests.replace(model, case, tally, 0.7),
        "replace with a mask": tests.replace_masked,
        "add with a mask": tests.add_masked,
        "remove with a mask": tests.remove_masked,
    }[name]
    tally = Tally(name)
    for case in range(cases):
        painter.answer = ANSWERS[name](tests, case + shift)[1]
        test(painter, case, tally)  # type: ignore[arg-type]  # it has the methods of a model
    return tally


@pytest.mark.parametrize("name", ANSWERS)
def test_right_pictures_are_counted_as_right(tests: ThingTests, name: str) -> None:
    painter = Painter()
    tally = tally_of(tests, name, painter, CASES)
    assert all(count >= CASES - 1 for count in tally.right.values()), tally.right  # the judge itself may err once
    assert painter.prompts == [ANSWERS[name](tests, case)[0].prompt for case in range(CASES)]


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "remove with a mask"])
def test_pictures_of_other_cases_are_counted_as_wrong(tests: ThingTests, name: str) -> None:
    tally = tally_of(tests, name, Painter(), CASES, shift=50)
    key = "both" if name == "two things" else "thing"
    assert tally.right[key] == 0


def test_a_thing_that_stays_is_not_counted_as_removed(tests: ThingTests) -> None:
    tally = Tally("remove")
    painter = Painter()
    for case in range(CASES):
        subject = random_subject(random.Random(f"remove/{case}"))
        painter.answer = subject.drawn(tests.sprites, 128)
        tests.remove_masked(painter, case, tally)  # type: ignore[arg-type]
    assert tally.right["gone"] == 0


def test_a_thing_elsewhere_is_not_in_place(tests: ThingTests) -> None:
    tally = Tally("replace")
    painter = Painter()
    for case in range(CASES):
        wanted, _ = replaced(tests, case)
        painter.answer = wanted.drawn(tests.sprites, 80, ((216, 216),))
        tests.replace(painter, case, tally, 0.7)  # type: ignore[arg-type]
    assert tally.right["in_place"] == 0
    assert tally.right["thing"] >= CASES - 1


def test_prompts_name_the_words_of_the_things() -> None:
    assert Subject(("cat",), ("kitten",), "blue").prompt == "a kitten on a blue background"
    assert Subject(("apple", "owl"), ("apple", "owl"), "night").prompt == "an apple and an owl at night"
    assert Subject((), (), "orange").prompt == "orange background"
    assert Subject((), (), "meadow").prompt == "an empty meadow"
