"""Draw the sample pictures in tests/data that the tests and the README use. Takes no arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.builtin_model.thing_pictures import load_sprites  # noqa: E402  importable only after the line above
from scripts.builtin_model.thing_scenes import Composition, Placed, draw_composition  # noqa: E402
from tests.reader import Figure, draw_scene  # noqa: E402

SIDE_PX = 256  # size of the built-in model
ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4 A: how a viewer must rotate the stored picture
ROTATED_90_CW = 6  # the viewer must rotate the stored picture by 90 degrees clockwise


def main() -> None:
    """Write every sample; the same version of Pillow writes the same bytes."""
    folder = ROOT / "tests" / "data"
    folder.mkdir(exist_ok=True)
    middle = SIDE_PX / 2

    circle = Image.fromarray(draw_scene("blue", [Figure("red", "circle", middle, middle, 68)], SIDE_PX))
    circle.save(folder / "red_circle.png", optimize=True)

    # Both masks select the middle: one is white where to repaint, the other (OpenAI's form) transparent.
    middle_part = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    middle_part[48:208, 48:208] = 255
    Image.fromarray(middle_part).save(folder / "mask_white.png", optimize=True)
    transparent = Image.merge("RGBA", [*circle.split(), Image.fromarray(255 - middle_part)])
    transparent.save(folder / "mask_alpha.png", optimize=True)

    # A yellow star near the top, stored rotated by 90 degrees, as a phone held upright stores it.
    star = Image.fromarray(draw_scene("purple", [Figure("yellow", "star", 128, 80, 64)], SIDE_PX))
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED_90_CW
    star.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated_star.jpg", quality=92, exif=exif)

    pair = draw_scene("white", [Figure("green", "square", 68, 128, 48), Figure("pink", "heart", 188, 128, 48)], SIDE_PX)
    Image.fromarray(pair).save(folder / "pair.webp", quality=90)

    dog = Composition("one", "yellow", (Placed("dog", int(middle), int(middle), 128),))
    drawn = Image.fromarray(draw_composition(dog, load_sprites(folder / "things.png")))
    for path in (folder / "dog.png", ROOT / "ovserve" / "web" / "sample-things.png"):
        drawn.save(path, optimize=True)


if __name__ == "__main__":
    main()
