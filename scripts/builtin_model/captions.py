"""Captions of compositions in informal wording: omitted clauses, filler words, edit verbs, unknown words."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from scripts.builtin_model.scenes import Composition
from tests.reader import COLOURS, SHAPES

__all__ = ["caption", "known_words", "plural", "with_article"]

Omits = Callable[[float], bool]  # decides whether to omit a clause, given the probability

_FILLER_TEXT = (
    "please photo picture image drawing painting of nice simple flat style icon logo with very high quality "
    "detailed beautiful digital art render cute illustration clean minimal 4k sharp design"
)
FILLERS = _FILLER_TEXT.split()
REQUESTS = (
    "make it",
    "turn it into",
    "change it to",
    "replace it with",
    "draw",
    "paint",
    "add",
    "show",
    "put",
    "i want",
    "a picture of",
    "a photo of",
    "an image of",
    "a drawing of",
    "edit to",
)
SIZES = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
PLACES = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
BACKGROUNDS = (
    "{0} on {2} background",
    "{0} on {2} background",
    "{0} on {1}",
    "{0} on {1} background",
    "{0}, {1} background",
    "{0} in front of {2} background",
    "{0} on the {1} background",
)
EMPTY = (
    "{0} background",
    "{0} background",
    "{2} background",
    "a simple {0} background",
    "clean {0} background",
    "fill with {0}",
    "remove the {1}, {0} background",
    "empty {0} background",
    "plain {0} background",
    "nothing on {2} background",
)
COUNTS = {"two": "two", "three": "three"}
_OTHER_TEXT = (  # further words with their own token; most of them are in no caption
    "a an one two three shape small tiny little large big huge in the center middle on left right at top bottom and "
    "next to "
    "background front of with make turn into change colour color grey gray is by it from this that remove fill "
    "replace object"
)


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(words: str) -> str:
    """Return the words with `a` or `an` before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def known_words() -> list[str]:
    """Return every word with its own token, sorted."""
    words = {*FILLERS, *_OTHER_TEXT.split(), *COLOURS, *SHAPES, *map(plural, SHAPES)}
    words.update(word for request in REQUESTS for word in request.split())
    return sorted(words)


def caption(composition: Composition, rng: random.Random, *, complete: bool = False) -> str:
    """Describe a composition.

    Args:
        composition: what to describe.
        rng: source of the wording.
        complete: describe everything in plain words; otherwise vary the wording, omit clauses and add words.
    """

    def omits(probability: float) -> bool:
        return not complete and rng.random() < probability

    if composition.kind == "empty":
        template = EMPTY[0] if complete else rng.choice(EMPTY)
        background = composition.background
        text = template.format(background, rng.choice(SHAPES), with_article(background))
    else:
        text = "" if omits(0.04) else _objects(composition, rng, omits, complete=complete)
        if not omits(0.22):
            template = BACKGROUNDS[0] if complete else rng.choice(BACKGROUNDS)
            template = template if text else "{0}{1} background"
            text = template.format(text, composition.background, with_article(composition.background))
    if not complete:
        text = _vary_wording(text, rng)
    return text or "shape"


def _objects(composition: Composition, rng: random.Random, omits: Omits, *, complete: bool) -> str:
    if composition.kind == "one":
        return _single(composition, rng, omits, complete=complete)
    if composition.kind in COUNTS:
        figure = composition.figures[0]
        words = plural(figure.shape) if omits(0.08) else f"{figure.colour} {plural(figure.shape)}"
        return f"{COUNTS[composition.kind]} {words}"
    left, right = (with_article(f"{figure.colour} {figure.shape}") for figure in composition.figures)
    both = f"{left} and {right}"
    if complete:
        return both
    forms = (
        (0.40, both),
        (0.15, f"{left} on the left and {right} on the right"),
        (0.10, f"{right} on the right and {left} on the left"),
        (0.10, f"{left} next to {right}"),
        (0.13, f"{left} on the left"),
        (0.12, f"{right} on the right"),
    )
    return rng.choices([text for _, text in forms], [share for share, _ in forms])[0]


def _single(composition: Composition, rng: random.Random, omits: Omits, *, complete: bool) -> str:
    figure = composition.figures[0]
    words = "shape" if omits(0.06) else figure.shape
    if not omits(0.08):
        words = f"{figure.colour} {words}"
    if composition.size and not omits(0.2):
        words = f"{rng.choice(SIZES[composition.size])} {words}"
    text = (
        with_article(words)
        if complete
        else rng.choice([with_article(words), with_article(words), f"one {words}", words])
    )
    omits_centre = composition.place == "center" and omits(0.8)
    if composition.place and not omits_centre and not omits(0.15):
        text = f"{text} {rng.choice(PLACES[composition.place])}"
    return text


def _vary_wording(text: str, rng: random.Random) -> str:
    if rng.random() < 0.12:
        text = f"{rng.choice(REQUESTS)} {text}"
    if rng.random() < 0.12:
        fillers = rng.sample(FILLERS, rng.randint(1, 3))
        text = (
            f"{' '.join(fillers)} {text}" if rng.random() < 0.4 else f"{text}, {rng.choice([' ', ', ']).join(fillers)}"
        )
    if rng.random() < 0.06:  # an unknown word, encoded as bytes, which the model must learn to ignore
        text += " " + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    return text.strip(", ")
