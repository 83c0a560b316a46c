"""Read pictures of flat shapes (background, objects, colours, positions), and draw them.

The built-in model draws flat shapes in ten colours, so a few lines of numpy can decide whether an edit followed its
prompt. Coordinates are pixels of the picture itself, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = [
    "COLOURS",
    "SHAPES",
    "SIDE_PX",
    "Figure",
    "Object",
    "Scene",
    "draw_scene",
    "has_contrast",
    "outline",
    "read_picture",
]

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Colour = tuple[int, int, int]

SIDE_PX = 128  # default side of drawn pictures: half of the built-in model's size
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "cyan": (60, 205, 225),
    "blue": (40, 80, 210),
    "purple": (130, 60, 170),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
    "black": (25, 25, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
RING_HOLE = 0.55  # of the outer radius

_CONTRAST_MIN = 110.0  # Euclidean RGB distance above which an object can be read on its background
_FOREGROUND_MIN = 60.0  # distance from the background above which a pixel belongs to an object
_AREA_MIN = 90 / SIDE_PX**2  # as a part of the picture; smaller patches are ignored
_RIM_PX = 3  # at SIDE_PX: the border whose median is the background
_TEMPLATE_PX = 32
_OVERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape to draw: `colour` is a name or RGB, centre and radius are in pixels, rotation in radians clockwise."""

    colour: str | Colour
    shape: str
    x: float
    y: float
    radius: float
    rotation: float = 0.0

    def scaled(self, factor: float) -> Figure:
        """Return the same figure for a picture `factor` times as large."""
        return replace(self, x=self.x * factor, y=self.y * factor, radius=self.radius * factor)


@dataclass(frozen=True, slots=True)
class Object:
    """One shape as it was read.

    Attributes:
        colour: the nearest of COLOURS for most of the inner pixels.
        shape: the most similar of SHAPES.
        similarity: 0..1, intersection over union with that shape at the same scale; above 0.85 for a clean drawing.
        x, y: centre of mass in pixels.
        area: number of pixels.
    """

    colour: str
    shape: str
    similarity: float
    x: float
    y: float
    area: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as it was read: the nearest of COLOURS to the background, and the objects from left to right."""

    background: str
    objects: tuple[Object, ...]

    @property
    def largest(self) -> Object | None:
        """The object with the most pixels; None on an empty background."""
        return max(self.objects, key=lambda item: item.area, default=None)


def has_contrast(first: str, second: str) -> bool:
    """Return whether an object of one colour can be read on a background of the other; symmetric."""
    return math.dist(COLOURS[first], COLOURS[second]) > _CONTRAST_MIN


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around the origin, y down.

    Raises:
        KeyError: the shape has no corners (circle, ring), or is unknown.
    """
    star = [radius * (0.46 if i % 2 else 1.1) for i in range(10)]
    bar = radius * 0.36
    turns = [i / 120 * 2 * math.pi for i in range(120)]
    corners = {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
        "triangle": [(0, -1), (0.98, 0.8), (-0.98, 0.8)],
    }
    if shape in corners:
        return [(radius * x, radius * y) for x, y in corners[shape]]
    if shape == "star":
        angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(star, angles, strict=True)]
    if shape == "cross":
        quarter = [(-bar, -radius), (bar, -radius), (bar, -bar), (radius, -bar), (radius, bar), (bar, bar)]
        return quarter + [(-x, -y) for x, y in quarter]
    if shape == "heart":
        return [(radius * 1.056 * math.sin(t) ** 3, -radius * (0.066 * _heart_height(t) + 0.1)) for t in turns]
    raise KeyError(shape)


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


def draw_scene(background: str | Colour, figures: Iterable[Figure], side_px: int = SIDE_PX) -> Pixels:
    """Draw a picture of flat shapes with smooth edges; later figures cover earlier ones.

    Returns:
        uint8 (side_px, side_px, 3), RGB.
    """
    behind = COLOURS[background] if isinstance(background, str) else background
    scale = _OVERSAMPLING
    canvas = Image.new("RGB", (side_px * scale, side_px * scale), behind)
    pen = ImageDraw.Draw(canvas)
    for figure in figures:
        paint = COLOURS[figure.colour] if isinstance(figure.colour, str) else figure.colour
        if figure.shape in ("circle", "ring"):
            _ellipse(pen, figure, figure.radius * scale, paint)
            if figure.shape == "ring":
                _ellipse(pen, figure, figure.radius * scale * RING_HOLE, behind)
        else:
            pen.polygon(_placed(figure), fill=paint)
    return np.asarray(canvas.reduce(scale))


def _ellipse(pen: ImageDraw.ImageDraw, figure: Figure, radius: float, paint: Colour) -> None:
    x, y = figure.x * _OVERSAMPLING, figure.y * _OVERSAMPLING
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=paint)


def _placed(figure: Figure) -> list[tuple[float, float]]:
    cos, sin = math.cos(figure.rotation), math.sin(figure.rotation)
    return [
        ((figure.x + x * cos - y * sin) * _OVERSAMPLING, (figure.y + x * sin + y * cos) * _OVERSAMPLING)
        for x, y in outline(figure.shape, figure.radius)
    ]


def read_picture(pixels: npt.NDArray[np.uint8]) -> Scene:
    """Read a picture of flat shapes.

    Args:
        pixels: uint8 (H, W, 3), RGB, both sides at least 32.

    Raises:
        ValueError: another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 32:
        raise ValueError(f"expected uint8 (H, W, 3) with sides of 32 or more, got {pixels.dtype} {pixels.shape}")
    rim = max(1, round(_RIM_PX * min(pixels.shape[:2]) / SIDE_PX))
    sides = (pixels[:rim], pixels[-rim:], pixels[:, :rim], pixels[:, -rim:])
    behind = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    distance = np.sqrt(((pixels.astype(np.float32) - behind) ** 2).sum(axis=-1))
    objects = [
        _read_object(pixels, patch)
        for patch in _patches(distance > _FOREGROUND_MIN)
        if patch.sum() >= _AREA_MIN * patch.size
    ]
    background = list(COLOURS)[int(_nearest_colours(behind[None].astype(np.float32))[0])]
    return Scene(background, tuple(sorted(objects, key=lambda item: item.x)))


def _read_object(pixels: Pixels, patch: Mask) -> Object:
    # Edge pixels are mixtures of two colours and may resemble a third one, so only inner pixels are counted.
    inner = patch.copy()
    inner[1:-1, 1:-1] &= patch[:-2, 1:-1] & patch[2:, 1:-1] & patch[1:-1, :-2] & patch[1:-1, 2:]
    voters = pixels[inner if inner.sum() > 20 else patch].astype(np.float32)
    colour = list(COLOURS)[int(np.bincount(_nearest_colours(voters), minlength=len(COLOURS)).argmax())]
    shape, similarity = _read_shape(patch)
    rows, columns = np.nonzero(patch)
    return Object(colour, shape, round(similarity, 3), float(columns.mean()), float(rows.mean()), int(patch.sum()))


def _nearest_colours(colours: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Return indices into COLOURS for float32 (N, 3)."""
    palette = np.array(list(COLOURS.values()), np.float32)
    nearest: npt.NDArray[np.intp] = ((colours[:, None] - palette) ** 2).sum(axis=-1).argmin(axis=-1)
    return nearest


def _read_shape(patch: Mask) -> tuple[str, float]:
    seen = _normalised(patch)
    scores = {
        shape: max(float((seen & template).sum() / (seen | template).sum()) for template in templates)
        for shape, templates in _templates().items()
    }
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


@cache
def _templates() -> dict[str, tuple[Mask, ...]]:
    """Return each shape at a few rotations, because shapes in the training set are rotated by up to 0.1 radians."""
    middle = SIDE_PX / 2

    def template(shape: str, rotation: float) -> Mask:
        drawn = draw_scene("white", [Figure("black", shape, middle, middle, 34, rotation)])
        return _normalised(drawn.mean(axis=-1) < 128)

    return {shape: tuple(template(shape, turn) for turn in (-0.1, -0.05, 0.0, 0.05, 0.1)) for shape in SHAPES}


def _normalised(patch: Mask) -> Mask:
    """Return the patch cut out, centred in a square and scaled to the side of the templates."""
    rows, columns = np.nonzero(patch)
    cut = patch[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = cut.shape
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = cut * np.uint8(255)
    scaled = Image.fromarray(square).resize((_TEMPLATE_PX, _TEMPLATE_PX), Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


def _patches(foreground: Mask) -> list[Mask]:
    """Return the 4-connected patches of a mask, one mask each.

    The runs of each row are joined with the runs of the row above that they touch (union-find).
    """
    runs: list[tuple[int, int, int]] = []  # row, first column, end
    parents: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    above: range = range(0)
    for row, line in enumerate(foreground):
        edges = np.flatnonzero(np.diff(line, prepend=False, append=False))
        current = range(len(runs), len(runs) + len(edges) // 2)
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            runs.append((row, start, end))
            parents.append(len(parents))
            for other in above:
                if runs[other][1] < end and start < runs[other][2]:
                    parents[root(other)] = root(len(runs) - 1)
        above = current
    patches: dict[int, Mask] = {}
    for index, (row, start, end) in enumerate(runs):
        patches.setdefault(root(index), np.zeros_like(foreground))[row, start:end] = True
    return list(patches.values())
