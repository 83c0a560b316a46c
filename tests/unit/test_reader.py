"""The reader finds what was drawn; other tests rely on that."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from tests.reader import COLOURS, SHAPES, Figure, draw_scene, has_contrast, read_picture

READABLE = [pair for pair in itertools.product(COLOURS, COLOURS) if has_contrast(*pair)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_and_shape_is_read_on_every_background_with_contrast(colour: str, shape: str) -> None:
    backgrounds = [other for other in COLOURS if has_contrast(colour, other)]
    assert len(backgrounds) >= 6
    for background in backgrounds:
        scene = read_picture(draw_scene(background, [Figure(colour, shape, 60, 70, 30)]))
        (found,) = scene.objects
        assert (scene.background, found.colour, found.shape) == (background, colour, shape)
        assert found.similarity > 0.85
        assert abs(found.x - 60) < 3
        assert abs(found.y - 70) < 6  # for a triangle and a heart, the centre of mass differs from the centre


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [16, 24, 36, 50])
@pytest.mark.parametrize("rotation", [-0.1, 0.07])
def test_a_shape_is_read_at_every_size_and_rotation_of_the_training_set(
    shape: str, radius: int, rotation: float
) -> None:
    (found,) = read_picture(draw_scene("blue", [Figure("yellow", shape, 64, 64, radius, rotation)])).objects
    assert found.shape == shape


def test_pointed_shapes_have_the_usual_orientation() -> None:
    widths = {
        shape: (draw_scene("white", [Figure("black", shape, 64, 64, 36)]).mean(axis=-1) < 128).sum(axis=1)
        for shape in ("star", "triangle", "heart")
    }
    tip = {shape: int(np.flatnonzero(rows)[0]) for shape, rows in widths.items()}
    assert widths["star"][tip["star"] + 3] < 8  # one tip up, two feet
    assert widths["triangle"][tip["triangle"] + 3] < 8
    assert widths["heart"][np.flatnonzero(widths["heart"])[-1] - 3] < 14  # tip down


def test_objects_are_sorted_from_left_to_right_and_largest_has_the_most_pixels() -> None:
    figures = [
        Figure("red", "star", 100, 40, 18),
        Figure("green", "circle", 30, 80, 24),
        Figure("black", "cross", 72, 96, 14),
    ]
    scene = read_picture(draw_scene("white", figures))
    assert [(item.colour, item.shape) for item in scene.objects] == [
        ("green", "circle"),
        ("black", "cross"),
        ("red", "star"),
    ]
    assert scene.largest is scene.objects[0]


def test_an_empty_background_has_no_objects() -> None:
    for background in COLOURS:
        scene = read_picture(draw_scene(background, []))
        assert (scene.background, scene.objects, scene.largest) == (background, (), None)


def test_specks_are_not_objects_and_noise_does_not_change_the_result() -> None:
    pixels = draw_scene("orange", [Figure("blue", "heart", 64, 64, 34)]).copy()
    pixels[10:15, 10:15] = 255
    noise = np.random.default_rng(1).integers(-12, 13, pixels.shape)
    noisy = np.clip(pixels.astype(int) + noise, 0, 255).astype(np.uint8)
    (found,) = read_picture(noisy).objects
    assert (found.colour, found.shape) == ("blue", "heart")


def test_a_larger_or_oblong_picture_is_read_in_its_own_pixels() -> None:
    pixels = draw_scene("cyan", [Figure("purple", "diamond", 200, 300, 90)], side_px=512)[100:]
    (found,) = read_picture(pixels).objects
    assert (found.colour, found.shape) == ("purple", "diamond")
    assert (round(found.x), round(found.y)) == (200, 200)


def test_a_shape_whose_parts_meet_only_in_a_later_row_is_one_object() -> None:
    pixels = draw_scene("white", []).copy()
    pixels[20:80, 20:30] = 0
    pixels[20:80, 60:70] = 0
    pixels[70:80, 20:70] = 0  # a U: two runs in most rows
    assert len(read_picture(pixels).objects) == 1


def test_other_shapes_have_a_low_similarity() -> None:
    bar = draw_scene("white", []).copy()
    bar[56:72, 20:108] = 0
    torn = draw_scene("white", [Figure("black", "circle", 64, 64, 36)]).copy()
    torn[64:, 64:] = 245
    torn[:64, 58:70] = 245
    for pixels in (bar, torn):
        assert all(item.similarity < 0.8 for item in read_picture(pixels).objects)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((128, 128), np.uint8),
        np.zeros((128, 128, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((64, 64, 3)),
    ],
)
def test_a_picture_that_is_not_uint8_rgb_is_rejected(pixels: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        read_picture(pixels)


def test_contrast_is_symmetric_and_no_colour_has_contrast_with_itself() -> None:
    assert all((second, first) in READABLE for first, second in READABLE)
    assert not any(has_contrast(name, name) for name in COLOURS)
