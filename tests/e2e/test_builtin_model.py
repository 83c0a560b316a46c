"""The packaged weights reach the rates of the model card, in fewer cases and with a margin for other processors."""

from __future__ import annotations

import pytest

from ovserve.models.profile import builtin_directory
from scripts.builtin_model import evaluate

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
