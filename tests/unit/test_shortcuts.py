"""Shortcuts: their syntax, and the steps at which guidance is computed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.engines.stepwise.shortcuts import EXACT, Shortcuts, parse_shortcuts


def both_rows(chosen: Shortcuts, steps: int) -> list[int]:
    """Return the steps at which the guidance difference is computed."""
    found: list[int] = []
    for index in range(steps):
        if not chosen.needs_denoiser(index, steps):
            continue
        if chosen.needs_both_rows(index, steps, found[-1] if found else None):
            found.append(index)
    return found


def test_empty_text_is_exact() -> None:
    assert parse_shortcuts("") == EXACT
    assert all(EXACT.needs_both_rows(index, 7, index - 1 if index else None) for index in range(7))


def test_pairs_are_parsed_in_any_order() -> None:
    assert parse_shortcuts("guidance_until=0.8, guidance_every=2") == Shortcuts(2, 0.0, 0.8)
    assert parse_shortcuts("guidance_from=0.25") == Shortcuts(1, 0.25, 1.0)
    assert parse_shortcuts("denoise_every=3") == Shortcuts(denoise_every=3)


@pytest.mark.parametrize(
    "text",
    [
        "guidance",
        "guidance_every",
        "guidance_every=0",
        "guidance_every=inf",
        "guidance_every=1.5",
        "guidance_every=two",
        "denoise_every=0",
        "guidance_until=1.1",
        "guidance_from=0.8,guidance_until=0.2",
        "guidance_from=-1",
        "guidance_until=nan",
        "steps=4",
    ],
)
def test_invalid_shortcut_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"shortcut|guidance|denoise|convert"):
        parse_shortcuts(text)


def test_both_rows_are_computed_at_the_first_guided_step_and_every_nth_after() -> None:
    chosen = parse_shortcuts("guidance_every=3,guidance_from=0.2,guidance_until=0.9")
    assert [index for index in range(10) if chosen.is_guided(index, 10)] == [2, 3, 4, 5, 6, 7, 8]
    assert both_rows(chosen, 10) == [2, 5, 8]


def test_a_step_that_is_left_out_moves_the_difference_to_the_next_one() -> None:
    chosen = parse_shortcuts("guidance_every=2,denoise_every=2")
    assert both_rows(chosen, 8) == [0, 3, 5, 7]


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
    computed = both_rows(chosen, steps)
    guided = [index for index in range(steps) if chosen.is_guided(index, steps)]
    assert set(computed) <= set(guided)
    assert computed[:1] == guided[:1]


@given(every=st.integers(1, 9), steps=st.integers(1, 60))
def test_denoiser_runs_at_the_first_two_steps_and_the_last_and_never_rests_longer(every: int, steps: int) -> None:
    chosen = Shortcuts(denoise_every=every)
    runs = [index for index in range(steps) if chosen.needs_denoiser(index, steps)]
    assert {0, min(1, steps - 1), steps - 1} <= set(runs)
    assert all(later - earlier <= every for earlier, later in itertools.pairwise(runs))
    assert every > 1 or len(runs) == steps
