"""Training scenes of the built-in model: random compositions of shapes, small edits of them, and their pictures."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tests.reader import COLOURS, SHAPES, SIDE_PX, Colour, Figure, draw_scene, has_contrast

__all__ = ["COMPOSITION_KINDS", "PICTURE_PX", "Composition", "draw_composition", "sample_composition", "sample_edit"]

COLOUR_NAMES = tuple(COLOURS)
PICTURE_PX = 256  # size of the model; compositions are laid out on a square of SIDE_PX and scaled up
MARGIN_PX = 4
# Objects that are not large are often at random positions; a model trained mostly on centred objects moves them there.
PLACES = ("left", "right", "top", "bottom", "center", "center", "center", None, None, None, None)
RADII_PX = {"small": (17.0, 23.0), "large": (44.0, 52.0), None: (28.0, 40.0)}
# Kinds of compositions with their share of the scenes. Counts and pairs are the hardest for the model, so they get a
# larger share; empty scenes train the removal of objects.
COMPOSITION_KINDS = {"one": 0.48, "two": 0.12, "three": 0.14, "pair": 0.18, "empty": 0.08}
_ROW_OF_TWO: tuple[tuple[int, int], ...] = ((34, 64), (94, 64))
_ROWS_OF_THREE = (((24, 64), (64, 64), (104, 64)), ((64, 32), (32, 92), (96, 92)))


@dataclass(frozen=True, slots=True)
class Composition:
    """One picture before it is drawn.

    Attributes:
        kind: a key of COMPOSITION_KINDS.
        background: name of its colour.
        figures: figures with colours by name, in the order of the captions, from left to right.
        size, place: size and position of a single figure for the caption; None where the caption has no word for it.
    """

    kind: str
    background: str
    figures: tuple[Figure, ...]
    size: str | None = None
    place: str | None = None


def sample_composition(rng: random.Random, kind: str | None = None) -> Composition:
    """Draw a composition at random; shapes, colours and backgrounds are uniform."""
    kind = kind or rng.choices(list(COMPOSITION_KINDS), list(COMPOSITION_KINDS.values()))[0]
    background = rng.choice(COLOUR_NAMES)
    colours = [name for name in COLOUR_NAMES if has_contrast(name, background)]
    if kind == "empty":
        return Composition(kind, background, ())
    look = (rng.choice(colours), rng.choice(SHAPES))
    if kind == "one":
        return _single(rng, background, look)
    if kind == "pair":
        others = [name for name in colours if has_contrast(name, look[0])] or colours
        looks = [look, (rng.choice(others), rng.choice(SHAPES))]
    else:
        looks = [look] * {"two": 2, "three": 3}[kind]
    return Composition(kind, background, _row(rng, looks))


def _single(rng: random.Random, background: str, look: tuple[str, str]) -> Composition:
    size = rng.choice(["small", "large", None, None])
    radius = rng.uniform(*RADII_PX[size])
    place = "center" if size == "large" else rng.choice(PLACES)
    margin, middle = radius + MARGIN_PX, SIDE_PX / 2
    near = rng.uniform(margin, max(margin, 40))
    x, y = {
        "left": (near, middle),
        "right": (SIDE_PX - near, middle),
        "top": (middle, near),
        "bottom": (middle, SIDE_PX - near),
        "center": (middle, middle),
        None: (rng.uniform(margin, SIDE_PX - margin), rng.uniform(margin, SIDE_PX - margin)),
    }[place]
    if place is not None:
        x, y = x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)
    return Composition("one", background, (Figure(*look, x, y, radius, _turn(rng)),), size, place)


def _row(rng: random.Random, looks: list[tuple[str, str]]) -> tuple[Figure, ...]:
    spots = _ROW_OF_TWO if len(looks) == 2 else rng.choice(_ROWS_OF_THREE)
    radius = rng.uniform(18, 23.5) if len(looks) == 2 else rng.uniform(12, 15.5)
    figures = []
    for (colour, shape), (x, y) in zip(looks, spots, strict=True):
        # Figures never touch, so that the number in the caption is the number of visible objects.
        here = radius * rng.uniform(0.92, 1.08)
        figures.append(Figure(colour, shape, x + rng.uniform(-3, 3), y + rng.uniform(-5, 5), here, _turn(rng)))
    return tuple(figures)


def _turn(rng: random.Random) -> float:
    return rng.uniform(-0.1, 0.1)


def sample_edit(after: Composition, rng: random.Random) -> Composition:
    """Return a composition from which one edit makes `after`, with the same layout.

    They differ in one of these: a colour, a shape, the background, or one object more or less.
    """
    what = rng.choices(["colour", "shape", "background", "object"], [0.4, 0.25, 0.2, 0.15])[0]
    if what == "object" or not after.figures:
        return _without_last(after) if after.figures else _with_one(after, rng)
    if what == "background":
        used = [figure.colour for figure in after.figures if isinstance(figure.colour, str)]
        backgrounds = [name for name in COLOUR_NAMES if all(has_contrast(name, colour) for colour in used)]
        backgrounds.remove(after.background)
        if backgrounds:
            return replace(after, background=rng.choice(backgrounds))
    index = rng.randrange(len(after.figures))
    figure = after.figures[index]
    if what == "shape":
        changed = replace(figure, shape=rng.choice([shape for shape in SHAPES if shape != figure.shape]))
    else:
        colours = [name for name in COLOUR_NAMES if has_contrast(name, after.background) and name != figure.colour]
        changed = replace(figure, colour=rng.choice(colours))
    if after.kind in ("two", "three"):  # all figures are equal, before and after
        equal = tuple(replace(item, colour=changed.colour, shape=changed.shape) for item in after.figures)
        return replace(after, figures=equal)
    return replace(after, figures=(*after.figures[:index], changed, *after.figures[index + 1 :]))


def _without_last(after: Composition) -> Composition:
    kind = {"one": "empty", "two": "one", "pair": "one", "three": "two"}[after.kind]
    return Composition(kind, after.background, after.figures[:-1])


def _with_one(after: Composition, rng: random.Random) -> Composition:
    single = sample_composition(rng, "one")
    colours = [name for name in COLOUR_NAMES if has_contrast(name, after.background)]
    figure = replace(single.figures[0], colour=rng.choice(colours))
    return replace(single, background=after.background, figures=(figure,))


def draw_composition(composition: Composition, rng: random.Random) -> npt.NDArray[np.uint8]:
    """Draw a composition in slightly varied colours: uint8 (PICTURE_PX, PICTURE_PX, 3), RGB."""
    figures = [
        replace(figure, colour=_varied(figure.colour, rng, 10)).scaled(PICTURE_PX / SIDE_PX)
        for figure in composition.figures
    ]
    return draw_scene(_varied(composition.background, rng, 8), figures, PICTURE_PX)


def _varied(colour: str | Colour, rng: random.Random, spread: int) -> Colour:
    red, green, blue = COLOURS[colour] if isinstance(colour, str) else colour

    def vary(level: int) -> int:
        return int(min(255, max(0, level + rng.uniform(-spread, spread))))

    return vary(red), vary(green), vary(blue)
