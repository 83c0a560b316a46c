"""Shortcuts: their syntax, and the steps at which guidance is computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.engines.stepwise.shortcuts import EXACT, Shortcuts, parse_shortcuts


def test_empty_text_is_exact() -> None:
    assert parse_shortcuts("") == EXACT
    assert all(EXACT.needs_both_rows(index, 7) for index in range(7))


def test_pairs_are_parsed_in_any_order() -> None:
    assert parse_shortcuts("guidance_until=0.8, guidance_every=2") == Shortcuts(2, 0.0, 0.8)
    assert parse_shortcuts("guidance_from=0.25") == Shortcuts(1, 0.25, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "guidance",
        "guidance_every",
        "guidance_every=0",
        "guidance_every=inf",
        "guidance_every=1.5",
        "guidance_every=two",
        "guidance_until=1.1",
        "guidance_from=0.8,guidance_until=0.2",
        "guidance_from=-1",
        "guidance_until=nan",
        "steps=4",
    ],
)
def test_invalid_shortcut_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"shortcut|guidance|convert"):
        parse_shortcuts(text)


def test_both_rows_are_computed_at_the_first_guided_step_and_every_nth_after() -> None:
    chosen = parse_shortcuts("guidance_every=3,guidance_from=0.2,guidance_until=0.9")
    assert [index for index in range(10) if chosen.is_guided(index, 10)] == [2, 3, 4, 5, 6, 7, 8]
    assert [index for index in range(10) if chosen.needs_both_rows(index, 10)] == [2, 5, 8]


@given(
    every=st.integers(1, 9),
    start=st.floats(0, 1),
    length=st.floats(0, 1),
    steps=st.integers(1, 60),
)
def test_every_guided_step_has_a_difference_computed_before(
    every: int, start: float, length: float, steps: int
) -> None:
    chosen = Shortcuts(every, start, min(1.0, start + length))
    is_known = False
    for index in range(steps):
        is_known = is_known or chosen.needs_both_rows(index, steps)
        assert is_known or not chosen.is_guided(index, steps)
        assert chosen.is_guided(index, steps) or not chosen.needs_both_rows(index, steps)
