"""The sample pictures match their names, and have the formats that tests need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.reader import read_picture

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    ("name", "file_format", "background", "objects"),
    [
        ("red_circle.png", "PNG", "blue", [("red", "circle")]),
        ("rotated_star.jpg", "JPEG", "purple", [("yellow", "star")]),
        ("pair.webp", "WEBP", "white", [("green", "square"), ("pink", "heart")]),
    ],
)
def test_a_sample_matches_its_name(
    name: str, file_format: str, background: str, objects: list[tuple[str, str]]
) -> None:
    with Image.open(DATA / name) as image:
        assert image.format == file_format
        scene = read_picture(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    assert scene.background == background
    assert [(item.colour, item.shape) for item in scene.objects] == objects


def test_the_rotated_sample_is_upright_only_with_its_exif_orientation_applied() -> None:
    with Image.open(DATA / "rotated_star.jpg") as image:
        (stored,) = read_picture(np.asarray(image)).objects
        (upright,) = read_picture(np.asarray(ImageOps.exif_transpose(image))).objects
    assert upright.y < 100 < 110 < upright.x
    assert stored.x < 100 < 110 < stored.y


def test_both_masks_repaint_the_same_part() -> None:
    with Image.open(DATA / "mask_white.png") as white, Image.open(DATA / "mask_alpha.png") as alpha:
        assert (white.mode, alpha.mode) == ("L", "RGBA")
        repainted = np.asarray(white) == 255
        assert np.array_equal(repainted, np.asarray(alpha)[..., 3] == 0)
    assert 0.3 < repainted.mean() < 0.5
