"""The packaged weights reach the rates of their model cards, in fewer cases and with a margin for other processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovserve.models.profile import builtin_directory
from scripts.builtin_model import evaluate
from scripts.builtin_model.evaluate_things import ThingTests
from scripts.builtin_model.thing_pictures import load_sprites

CASES = 12
# Minimum number of correct results in the twelve cases, for each test of the report.
FLOORS = {
    "round trip": {"colour": 12, "shape": 11, "background": 12},
    "text to image": {"colour": 12, "shape": 11, "background": 12, "one": 12},
    "count two": {"count": 11},
    "count three": {"count": 11},
    "inpaint one of a pair": {"colour": 11, "shape": 11, "background": 12},
    "replace in place": {"obeyed": 11},
    "remove": {"gone": 12},
    "recolour at 0.5": {"obeyed": 12, "in_place": 11},
    "recolour at 0.7": {"obeyed": 11, "in_place": 9},
    "reshape at 0.7": {"obeyed": 11},
    "reshape at 0.85": {"obeyed": 10},
    "background at 0.7": {"obeyed": 11},
    "background at 0.85": {"obeyed": 10},
}


FLOORS_OF_THINGS = {
    "judge": {"thing": 12, "background": 12},
    "round trip": {"thing": 11, "background": 12},
    "text to image": {"thing": 10, "background": 12},
    "two things": {"both": 9, "one": 11},
    "replace with a mask": {"thing": 10},
    "add with a mask": {"thing": 10},
    "remove with a mask": {"gone": 11},
    "replace at 0.7": {"thing": 9, "background": 11, "in_place": 8},
    "background at 0.7": {"thing": 9, "background": 11},
}
DRAWINGS = Path(__file__).parents[1] / "data" / "things.png"


@pytest.fixture(scope="module")
def model() -> evaluate.Model:
    return evaluate.Model(builtin_directory(), threads=2, steps=12, guidance_scale=3.0)


@pytest.mark.parametrize("name", FLOORS)
def test_builtin_model_reaches_the_rates_of_its_card(model: evaluate.Model, name: str) -> None:
    test = evaluate.tests(builtin_directory(), threads=2)[name]
    tally = evaluate.Tally(name)
    for case in range(CASES):
        test(model, case, tally)
    assert all(tally.right[key] >= floor for key, floor in FLOORS[name].items()), tally.right


@pytest.fixture(scope="module")
def things() -> evaluate.Model:
    return evaluate.Model(builtin_directory("things"), threads=2, steps=12, guidance_scale=3.0)


@pytest.fixture(scope="module")
def tests_of_things() -> dict[str, evaluate.Test]:
    return ThingTests(load_sprites(DRAWINGS)).table(builtin_directory("things"), threads=2)


@pytest.mark.parametrize("name", FLOORS_OF_THINGS)
def test_things_reach_the_rates_of_their_card(
    things: evaluate.Model, tests_of_things: dict[str, evaluate.Test], name: str
) -> None:
    tally = evaluate.Tally(name)
    for case in range(CASES):
        tests_of_things[name](things, case, tally)
    assert all(tally.right[key] >= floor for key, floor in FLOORS_OF_THINGS[name].items()), tally.right
