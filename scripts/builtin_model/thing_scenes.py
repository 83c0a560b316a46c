"""Training scenes of the world "things": random compositions of things on plain colours and in simple landscapes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from scripts.builtin_model.things import thing_names

__all__ = [
    "COLOURS",
    "COMPOSITION_KINDS",
    "GRID_PX",
    "KINDS_OF_EDITS",
    "LANDSCAPES",
    "PICTURE_PX",
    "SIZES_PX",
    "Composition",
    "Placed",
    "Sprites",
    "draw_backdrop",
    "draw_composition",
    "sample_composition",
    "sample_edit",
]

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

PICTURE_PX = 256
# Softer than pure colours, so that things in strong colours are visible on all of them.
COLOURS: dict[str, Colour] = {
    "red": (222, 92, 92),
    "orange": (246, 170, 96),
    "yellow": (250, 226, 120),
    "green": (120, 190, 120),
    "cyan": (140, 222, 228),
    "blue": (104, 146, 226),
    "purple": (166, 120, 204),
    "pink": (248, 178, 208),
    "brown": (150, 112, 86),
    "white": (246, 246, 246),
    "grey": (168, 168, 172),
    "black": (44, 44, 50),
}
LANDSCAPES = ("meadow", "beach", "night")
_SKY, _GRASS, _SEA, _SAND, _DARK = (168, 216, 246), (132, 196, 100), (72, 148, 214), (240, 216, 160), (38, 44, 92)
_STARS = ((22, 30), (58, 84), (96, 22), (140, 58), (178, 26), (214, 90), (240, 40), (30, 150), (236, 168), (120, 118))

# Centres are on this grid, the side of a patch of 2 by 2 latents, and each size is fixed. On all of the grid a thing
# has the same patches: the denoiser learns a drawing once, and not again for each offset within a patch.
GRID_PX = 32
# There are only three sizes: two things are as large as one, and three are small.
SIZES_PX = {"small": 80, None: 128, "large": 192}
_ROW_PX = {2: 128, 3: 80}  # sizes of two and of three things
_CENTRES = {2: ((64, 192), (128,)), 3: ((48, 128, 208), (128,))}  # three fit only half a grid step off
# Kinds of compositions with their share of the scenes.
COMPOSITION_KINDS = {"one": 0.58, "pair": 0.24, "three": 0.08, "empty": 0.10}
# A single thing has no place of its own in the caption of an edit: it takes more examples.
KINDS_OF_EDITS = {"one": 0.70, "pair": 0.18, "three": 0.05, "empty": 0.07}
LANDSCAPE_SHARE = 0.25
# Where a single thing is, and the word for it; None: anywhere, without a word.
PLACES = ("left", "right", "top", "bottom", "center", "center", "center", "center", None, None)
# In pictures that are made from another one, more things are anywhere: the other picture shows where.
PLACES_OF_EDITS = ("left", "right", "top", "bottom", "center", None, None, None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing in a picture: its name, its centre, and the side of the square that it fills, in pixels."""

    name: str
    x: int
    y: int
    side: int


@dataclass(frozen=True, slots=True)
class Composition:
    """One picture before it is drawn.

    Attributes:
        kind: a key of COMPOSITION_KINDS.
        background: a key of COLOURS, or one of LANDSCAPES.
        things: the things, in the order of the captions, from left to right.
        size, place: size and position of a single thing for the caption; None where the caption has no word for it.
    """

    kind: str
    background: str
    things: tuple[Placed, ...]
    size: str | None = None
    place: str | None = None


class Sprites:
    """Drawings of things at any size.

    Args:
        drawings: for each name, uint8 (side, side, 4), RGBA, on a transparent ground.
    """

    def __init__(self, drawings: dict[str, Pixels]) -> None:
        self._drawings = drawings
        self._scaled: dict[tuple[str, int], Pixels] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the things."""
        return tuple(self._drawings)

    def scaled(self, name: str, side: int) -> Pixels:
        """Return the drawing with this side: uint8 (side, side, 4), RGBA."""
        if side == len(self._drawings[name]):
            return self._drawings[name]
        if (name, side) not in self._scaled:
            # Pillow scales RGBa, with colours multiplied by alpha, so that transparent pixels do not darken edges.
            image = Image.fromarray(self._drawings[name]).convert("RGBa")
            scaled = image.resize((side, side), Image.Resampling.BOX if side < 96 else Image.Resampling.BICUBIC)
            self._scaled[name, side] = np.asarray(scaled.convert("RGBA"))
        return self._scaled[name, side]


def sample_composition(rng: random.Random, kind: str | None = None, *, is_edited: bool = False) -> Composition:
    """Draw a composition at random; things and plain backgrounds are uniform.

    Args:
        rng: source of the choices.
        kind: a key of COMPOSITION_KINDS; None: any of them.
        is_edited: the composition is for a picture that is made from another one, see KINDS_OF_EDITS.
    """
    kinds, places = (KINDS_OF_EDITS, PLACES_OF_EDITS) if is_edited else (COMPOSITION_KINDS, PLACES)
    kind = kind or rng.choices(list(kinds), list(kinds.values()))[0]
    background = rng.choice(LANDSCAPES) if rng.random() < LANDSCAPE_SHARE else rng.choice(list(COLOURS))
    if kind == "empty":
        return Composition(kind, background, ())
    if kind == "one":
        return _single(rng, background, places)
    count = {"pair": 2, "three": 3}[kind]
    columns, rows = _CENTRES[count]
    names, row = rng.sample(thing_names(), count), rng.choice(rows)
    things = [Placed(name, x, row, _ROW_PX[count]) for name, x in zip(names, columns, strict=True)]
    return Composition(kind, background, tuple(things))


def _single(rng: random.Random, background: str, places: Sequence[str | None]) -> Composition:
    size = rng.choice(["small", "large", None, None, None, None])
    side = SIZES_PX[size]
    place = "center" if size == "large" else rng.choice(places)
    middle = PICTURE_PX // 2
    near = -(-side // 2 // GRID_PX) * GRID_PX
    low, high = near, PICTURE_PX - near
    x, y = {
        "left": (low, middle),
        "right": (high, middle),
        "top": (middle, low),
        "bottom": (middle, high),
        "center": (middle, middle),
        None: (rng.randrange(low, high + 1, GRID_PX), rng.randrange(low, high + 1, GRID_PX)),
    }[place]
    return Composition("one", background, (Placed(rng.choice(thing_names()), x, y, side),), size, place)


def sample_edit(after: Composition, rng: random.Random) -> Composition:
    """Return a composition from which one edit makes `after`, with the same layout.

    They differ in one of these: a thing, the background, or one thing more or less.
    """
    what = rng.choices(["thing", "background", "number"], [0.6, 0.18, 0.22])[0]
    if what == "background":
        return replace(after, background=rng.choice([*LANDSCAPES, *COLOURS]))
    if what == "number" or not after.things:
        if after.things:
            kind = {"one": "empty", "pair": "one", "three": "pair"}[after.kind]
            left = list(after.things)
            del left[rng.randrange(len(left))]
            return Composition(kind, after.background, tuple(left))
        return _single(rng, after.background, PLACES_OF_EDITS)
    index = rng.randrange(len(after.things))
    was = after.things[index]
    # A picture to edit was not drawn on the grid: the model learns to put the new thing at the nearest place of it.
    shift = GRID_PX // 2
    before = replace(
        was,
        name=rng.choice(thing_names()),
        x=was.x + rng.randint(-shift, shift),
        y=was.y + rng.randint(-shift, shift),
    )
    return replace(after, things=(*after.things[:index], before, *after.things[index + 1 :]))


def draw_composition(composition: Composition, sprites: Sprites, rng: random.Random | None = None) -> Pixels:
    """Draw a composition: uint8 (PICTURE_PX, PICTURE_PX, 3), RGB.

    Args:
        composition: what to draw.
        sprites: the drawings of the things.
        rng: varies the colour of a plain background slightly; None: no variation.
    """
    colour = COLOURS.get(composition.background)
    if colour is None:
        canvas = draw_backdrop(composition.background).copy()
    else:
        varied = [min(255, max(0, level + (rng.randint(-5, 5) if rng else 0))) for level in colour]
        canvas = np.full((PICTURE_PX, PICTURE_PX, 3), varied, np.uint8)
    for thing in composition.things:
        _paste(canvas, sprites.scaled(thing.name, thing.side), thing.x - thing.side // 2, thing.y - thing.side // 2)
    return canvas


def _paste(canvas: Pixels, drawing: Pixels, left: int, top: int) -> None:
    """Paste RGBA over the canvas; what is outside is cut off."""
    side, end = len(drawing), len(canvas)
    rows = slice(max(0, top), min(end, top + side))
    columns = slice(max(0, left), min(end, left + side))
    part = drawing[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left].astype(np.uint16)
    alpha = part[..., 3:]
    mixed = (part[..., :3] * alpha + canvas[rows, columns] * (255 - alpha) + 127) // 255
    canvas[rows, columns] = mixed.astype(np.uint8)


@cache
def draw_backdrop(name: str) -> Pixels:
    """Return an empty background: uint8 (PICTURE_PX, PICTURE_PX, 3), RGB. Callers copy it before they draw on it.

    Raises:
        KeyError: there is no such background.
    """
    canvas = np.empty((PICTURE_PX, PICTURE_PX, 3), np.uint8)
    if name == "meadow":
        canvas[:144], canvas[144:] = _SKY, _GRASS
    elif name == "beach":
        canvas[:96], canvas[96:160], canvas[160:] = _SKY, _SEA, _SAND
    elif name == "night":
        canvas[:] = _DARK
        for x, y in _STARS:
            canvas[y - 2 : y + 2, x - 2 : x + 2] = (250, 240, 190)
    else:
        canvas[:] = COLOURS[name]
    return canvas
