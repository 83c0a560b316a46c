"""Training scenes match their captions, and an edit changes one thing only."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from scripts.builtin_model.captions import caption, known_words, plural
from scripts.builtin_model.scenes import COMPOSITION_KINDS, draw_composition, sample_composition, sample_edit
from tests.reader import COLOURS, has_contrast, read_picture

FIGURES = {"empty": 0, "one": 1, "two": 2, "pair": 2, "three": 3}


@pytest.mark.parametrize("kind", COMPOSITION_KINDS)
def test_a_scene_is_read_as_it_was_composed(kind: str) -> None:
    rng = random.Random(1)
    for _ in range(40):
        composition = sample_composition(rng, kind)
        seen = read_picture(draw_composition(composition, rng))
        assert seen.background == composition.background
        placed = sorted(composition.figures, key=lambda figure: figure.x)
        assert [(item.colour, item.shape) for item in seen.objects] == [(item.colour, item.shape) for item in placed]
        assert len(seen.objects) == FIGURES[kind]


def test_kinds_have_their_share() -> None:
    rng = random.Random(2)
    seen = Counter(sample_composition(rng).kind for _ in range(4000))
    assert all(abs(seen[kind] / 4000 - share) < 0.03 for kind, share in COMPOSITION_KINDS.items())


def test_an_edit_differs_in_one_thing_and_stays_readable() -> None:
    rng = random.Random(3)
    for _ in range(400):
        after = sample_composition(rng)
        before = sample_edit(after, rng)
        assert before != after
        assert all(has_contrast(str(figure.colour), before.background) for figure in before.figures)
        recoloured = before.background != after.background
        added = len(before.figures) != len(after.figures)
        pairs = zip(before.figures, after.figures, strict=False)
        looks = [(was.colour != now.colour, was.shape != now.shape) for was, now in pairs]
        places_kept = all(
            (was.x, was.y, was.radius) == (now.x, now.y, now.radius)
            for was, now in zip(before.figures, after.figures, strict=False)
        )
        changed = {"colour": any(c for c, _ in looks), "shape": any(s for _, s in looks)}
        assert recoloured + added + changed["colour"] + changed["shape"] == 1
        assert places_kept


def test_a_complete_caption_names_everything() -> None:
    rng = random.Random(4)
    for _ in range(200):
        composition = sample_composition(rng)
        words = caption(composition, rng, complete=True).split()
        assert composition.background in words
        for figure in composition.figures:
            assert figure.colour in words
            assert figure.shape in words or plural(figure.shape) in words


def test_captions_are_mostly_known_words_and_never_empty() -> None:
    rng = random.Random(5)
    known = set(known_words())
    words: Counter[bool] = Counter()
    for _ in range(1000):
        text = caption(sample_composition(rng), rng)
        assert text.strip()
        words.update(word in known for word in text.replace(",", " ").split())
    assert words[True] / words.total() > 0.97
    assert words[False] > 0  # training requires unknown words too


def test_every_colour_appears_on_every_background_with_contrast() -> None:
    rng = random.Random(6)
    seen = {
        (str(composition.figures[0].colour), composition.background)
        for composition in (sample_composition(rng, "one") for _ in range(4000))
    }
    assert seen == {(colour, behind) for colour in COLOURS for behind in COLOURS if has_contrast(colour, behind)}
