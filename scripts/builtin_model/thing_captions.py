"""Captions of the world "things": short free English with synonyms, omitted clauses, filler and unknown words."""

from __future__ import annotations

import random
import string

from scripts.builtin_model.captions import FILLERS, PLACES, REQUESTS, SIZES, with_article
from scripts.builtin_model.thing_scenes import COLOURS, LANDSCAPES, Composition
from scripts.builtin_model.things import THINGS, find_thing

__all__ = ["caption", "known_words"]

_PLAIN = (
    "{0} on {2} background",
    "{0} on {2} background",
    "{0} on {1}",
    "{0}, {1} background",
    "{0} in front of {2} background",
    "{0} on a table of {1}",
    "{0} on {2} wall",
)
_EMPTY_PLAIN = (
    "{0} background",
    "{0} background",
    "{2} background",
    "an empty {0} background",
    "remove the {1}, {0} background",
    "nothing on {2} background",
    "plain {0}",
)
_LANDSCAPES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on grass", "on the grass", "in the park", "in a field", "on a lawn"),
    "beach": ("at the beach", "on the beach", "on sand by the sea", "at the sea", "on the sand"),
    "night": ("at night", "in the night sky", "under the stars", "in the dark"),
}
_EMPTY_LANDSCAPES: dict[str, tuple[str, ...]] = {
    "meadow": ("an empty meadow", "a meadow", "grass and sky", "remove the {0}, meadow", "a lawn"),
    "beach": ("an empty beach", "a beach", "sea and sand", "remove the {0}, beach", "the sea"),
    "night": ("an empty night sky", "night", "night sky", "remove the {0}, night sky", "stars at night"),
}
_OTHER_TEXT = (
    "a an one two three small tiny little large big huge in the center middle on left right at top bottom and next to "
    "background front of with make turn into change is by it from this that remove replace instead table wall empty "
    "nothing plain gray night sky grass meadow beach sand sea field park lawn dark stars under color colour style flat"
)


def known_words() -> list[str]:
    """Return every word with its own token, sorted."""
    words = {*FILLERS, *_OTHER_TEXT.split(), *COLOURS, *LANDSCAPES}
    for thing in THINGS:
        words.update(word for text in thing.words for word in text.replace("-", " ").split())
    words.update(word for request in REQUESTS for word in request.split())
    return sorted(words)


def caption(composition: Composition, rng: random.Random, *, complete: bool = False) -> str:
    """Describe a composition.

    Args:
        composition: what to describe.
        rng: source of the wording.
        complete: describe everything with the usual names; otherwise vary the wording, omit clauses and add words.
    """

    def omits(probability: float) -> bool:
        return not complete and rng.random() < probability

    colour = composition.background
    if colour == "grey" and omits(0.3):
        colour = "gray"
    if not composition.things:
        return _varied(_empty(composition.background, colour, rng, complete=complete), rng, complete=complete)
    text = _things(composition, rng, complete=complete)
    if not omits(0.15):
        if composition.background in LANDSCAPES:
            wordings = _LANDSCAPES[composition.background]
            text = f"{text} {wordings[0] if complete else rng.choice(wordings)}"
        else:
            wordings = _PLAIN
            text = (wordings[0] if complete else rng.choice(wordings)).format(text, colour, with_article(colour))
    return _varied(text, rng, complete=complete)


def _empty(background: str, colour: str, rng: random.Random, *, complete: bool) -> str:
    other = rng.choice(THINGS).name
    if background in LANDSCAPES:
        wordings = _EMPTY_LANDSCAPES[background]
        return (wordings[0] if complete else rng.choice(wordings)).format(other)
    return (_EMPTY_PLAIN[0] if complete else rng.choice(_EMPTY_PLAIN)).format(colour, other, with_article(colour))


def _word(name: str, rng: random.Random, *, complete: bool) -> str:
    words = find_thing(name).words
    return name if complete or rng.random() < 0.6 else rng.choice(words)


def _things(composition: Composition, rng: random.Random, *, complete: bool) -> str:
    words = [_word(thing.name, rng, complete=complete) for thing in composition.things]
    if composition.kind == "one":
        return _single(composition, words[0], rng, complete=complete)
    named = [word if not complete and rng.random() < 0.1 else with_article(word) for word in words]
    if len(named) == 3:
        return f"{named[0]}, {named[1]} and {named[2]}"
    both = f"{named[0]} and {named[1]}"
    if complete:
        return both
    forms = (
        (0.45, both),
        (0.20, f"{named[0]} on the left and {named[1]} on the right"),
        (0.15, f"{named[1]} on the right and {named[0]} on the left"),
        (0.20, f"{named[0]} next to {named[1]}"),
    )
    return rng.choices([text for _, text in forms], [share for share, _ in forms])[0]


def _single(composition: Composition, word: str, rng: random.Random, *, complete: bool) -> str:
    if composition.size and (complete or rng.random() < 0.8):
        word = f"{rng.choice(SIZES[composition.size])} {word}"
    text = with_article(word) if complete else rng.choice([with_article(word), with_article(word), f"one {word}", word])
    centred = composition.place == "center"
    if composition.place and (complete or rng.random() < (0.2 if centred else 0.85)):
        text = f"{text} {rng.choice(PLACES[composition.place])}"
    return text


def _varied(text: str, rng: random.Random, *, complete: bool) -> str:
    if complete:
        return text
    if rng.random() < 0.12:
        if rng.random() < 0.3:
            text = f"replace the {rng.choice(THINGS).name} with {text}"
        else:
            text = f"{rng.choice(REQUESTS)} {text}"
    if rng.random() < 0.12:
        fillers = rng.sample(FILLERS, rng.randint(1, 3))
        text = f"{' '.join(fillers)} {text}" if rng.random() < 0.4 else f"{text}, {' '.join(fillers)}"
    if rng.random() < 0.06:  # an unknown word, encoded as bytes, which the model must learn to ignore
        text += " " + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    return text
