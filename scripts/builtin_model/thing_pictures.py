"""Draw the things from an icon set in Iconify's JSON format, and keep the drawings in one file."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from scripts.builtin_model.thing_scenes import Sprites
from scripts.builtin_model.things import THINGS, thing_names

__all__ = ["DRAWING_PX", "draw_things", "load_sprites", "save_sprites"]

Pixels = npt.NDArray[np.uint8]
DRAWING_PX = 192  # the largest size of a thing in a picture
_COLUMNS = 16  # drawings in a row of the file
_NAMES_KEY = "things"  # of the text in the PNG file


def main() -> None:
    """Parse the command line, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--icons", type=Path, required=True, help="icons.json of @iconify-json/fluent-emoji-flat")
    parser.add_argument("--out", type=Path, required=True, help="PNG file for the drawings")
    parser.add_argument("--side", type=int, default=DRAWING_PX, help="side of a drawing in pixels (%(default)s)")
    options = parser.parse_args()
    save_sprites(options.out, draw_things(json.loads(options.icons.read_text("utf-8")), options.side))


def draw_things(icons: dict[str, Any], side: int = DRAWING_PX) -> dict[str, Pixels]:
    """Draw each thing from its icon: uint8 (side, side, 4), RGBA.

    Raises:
        KeyError: the set has no such icon.
    """
    import resvg_py  # noqa: PLC0415  only here; tests and other stages read the drawings

    drawings = {}
    for thing in THINGS:
        icon = icons["icons"][thing.icon]
        width, height = (icon.get(name, icons[name]) for name in ("width", "height"))
        square = max(width, height)  # a few icons are wider than high, or higher than wide
        view = f"{(width - square) / 2} {(height - square) / 2} {square} {square}"
        picture = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}" width="{square}" height="{square}">{icon["body"]}</svg>'
        )
        data = bytes(resvg_py.svg_to_bytes(svg_string=picture, width=side, height=side))
        drawings[thing.name] = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    return drawings


def save_sprites(path: Path, drawings: dict[str, Pixels]) -> None:
    """Write drawings of one size to a PNG file, in rows, with their names in its text."""
    side = len(next(iter(drawings.values())))
    empty = np.zeros((side, side, 4), np.uint8)
    cells = [*drawings.values(), *[empty] * (-len(drawings) % _COLUMNS)]
    rows = [np.concatenate(cells[i : i + _COLUMNS], axis=1) for i in range(0, len(cells), _COLUMNS)]
    text = PngImagePlugin.PngInfo()
    text.add_text(_NAMES_KEY, ",".join(drawings))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, pnginfo=text, optimize=True)


def load_sprites(path: Path) -> Sprites:
    """Read drawings from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its drawings are not those of today's table of things.
    """
    with Image.open(path) as image:
        names = tuple(image.text[_NAMES_KEY].split(","))  # type: ignore[attr-defined]  # a PNG file
        pixels = np.asarray(image.convert("RGBA"))
    if names != thing_names():
        raise ValueError(f"{path}: the drawings are of other things than those of things.py; draw them again")
    side = pixels.shape[1] // _COLUMNS
    spots = [(i // _COLUMNS * side, i % _COLUMNS * side) for i in range(len(names))]
    drawings = (pixels[top : top + side, left : left + side] for top, left in spots)
    return Sprites(dict(zip(names, drawings, strict=True)))


if __name__ == "__main__":
    main()
