"""Draws the sample pictures under tests/data, which the tests and the README send: run it from anywhere, without arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.reader import Figure, draw_scene  # noqa: E402  the path above makes it importable

SIDE_PX = 256  # what the built-in model works at
ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4 A: how a viewer must turn the stored picture
ROTATED_90_CW = 6  # the stored picture is to be turned clockwise by a quarter


def main() -> None:
    """Write every sample; the bytes are the same at each run with the same Pillow."""
    folder = ROOT / "tests" / "data"
    folder.mkdir(exist_ok=True)
    middle = SIDE_PX / 2

    circle = Image.fromarray(draw_scene("blue", [Figure("red", "circle", middle, middle, 68)], SIDE_PX))
    circle.save(folder / "red_circle.png", optimize=True)

    # The two styles say the same: repaint the middle. White on black, and OpenAI's: transparent where to repaint.
    middle_part = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    middle_part[48:208, 48:208] = 255
    Image.fromarray(middle_part).save(folder / "mask_white.png", optimize=True)
    transparent = Image.merge("RGBA", [*circle.split(), Image.fromarray(255 - middle_part)])
    transparent.save(folder / "mask_alpha.png", optimize=True)

    # Shown: a yellow star near the top, upright. Stored: lying on its side, as a phone held upright stores it.
    star = Image.fromarray(draw_scene("purple", [Figure("yellow", "star", 128, 80, 64)], SIDE_PX))
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED_90_CW
    star.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated_star.jpg", quality=92, exif=exif)

    pair = draw_scene("white", [Figure("green", "square", 68, 128, 48), Figure("pink", "heart", 188, 128, 48)], SIDE_PX)
    Image.fromarray(pair).save(folder / "pair.webp", quality=90)


if __name__ == "__main__":
    main()
