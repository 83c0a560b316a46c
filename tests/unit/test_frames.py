"""Fitting an image to the frame, the frame to the canvas, and the canvas back to the frame."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.pixels.frames import Fitting, Placement, fit_into, scale_mask, size_of
from ovserve.pixels.images import Pixels
from ovserve.settings.options import Resolution

SIDES = st.integers(1, 60)
SIZES = st.builds(Resolution, SIDES, SIDES)


def gradient(size: Resolution, planes: int = 3) -> Pixels:
    """Return pixels whose red grows to the right and green downwards; alpha, if there is any, is 255."""
    pixels = np.full((size.height, size.width, planes), 255, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, size.width).astype(np.uint8)[None, :]
    pixels[..., 1] = np.linspace(0, 255, size.height).astype(np.uint8)[:, None]
    pixels[..., 2] = 0
    return pixels


def noise(size: Resolution, planes: int = 3) -> Pixels:
    return np.random.default_rng(3).integers(0, 256, (size.height, size.width, planes), np.uint8)


# --- sizes ------------------------------------------------------------------------------------------------------------


@given(SIZES, SIZES)
def test_fit_into_stays_within_the_limit_and_keeps_the_shape(size: Resolution, limit: Resolution) -> None:
    found = fit_into(size, limit)
    assert 1 <= found.width <= limit.width
    assert 1 <= found.height <= limit.height
    if size.width <= limit.width and size.height <= limit.height:
        assert found == size
    else:
        scale = min(limit.width / size.width, limit.height / size.height)
        assert abs(found.width - size.width * scale) <= 1
        assert abs(found.height - size.height * scale) <= 1


# --- image to frame ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("planes", [3, 4])
def test_image_of_the_frame_size_is_unchanged(mode: str, planes: int) -> None:
    pixels = noise(Resolution(50, 30), planes)
    fitting = Fitting.plan(size_of(pixels), Resolution(50, 30), mode)
    assert fitting.is_identity
    assert np.array_equal(fitting.fit_image(pixels), pixels)


@given(SIZES, SIZES, st.sampled_from(["crop", "pad", "stretch"]), st.sampled_from([3, 4]))
def test_every_resize_mode_gives_the_frame_size(source: Resolution, frame: Resolution, mode: str, planes: int) -> None:
    fitting = Fitting.plan(source, frame, mode)
    assert fitting.fit_image(noise(source, planes)).shape == (frame.height, frame.width, planes)
    assert fitting.fit_mask(np.zeros((source.height, source.width), np.uint8)).shape == (frame.height, frame.width)


def test_crop_without_scaling_copies_the_middle() -> None:
    pixels = noise(Resolution(51, 30))
    fitting = Fitting.plan(Resolution(51, 30), Resolution(30, 30), "crop")
    assert np.array_equal(fitting.fit_image(pixels), pixels[:, 10:40])


def test_crop_keeps_the_aspect_ratio() -> None:
    fitted = Fitting.plan(Resolution(200, 100), Resolution(50, 50), "crop").fit_image(gradient(Resolution(200, 100)))
    assert 60 <= fitted[25, 0, 0] <= 68  # the left quarter is cut off
    assert 187 <= fitted[25, -1, 0] <= 195
    assert fitted[0, 25, 1] <= 4
    assert fitted[-1, 25, 1] >= 251


def test_pad_shows_the_whole_image_and_repeats_its_edges() -> None:
    fitted = Fitting.plan(Resolution(200, 100), Resolution(50, 50), "pad").fit_image(gradient(Resolution(200, 100)))
    assert fitted[25, 0, 0] <= 4
    assert fitted[25, -1, 0] >= 251
    assert np.array_equal(fitted[0], fitted[12])  # 25 rows of image between bars of 12 and 13
    assert np.array_equal(fitted[-1], fitted[36])


def test_pad_bars_are_transparent_if_the_image_has_alpha() -> None:
    fitted = Fitting.plan(Resolution(20, 10), Resolution(20, 20), "pad").fit_image(gradient(Resolution(20, 10), 4))
    assert (fitted[:5, :, 3] == 0).all()
    assert (fitted[5:15, :, 3] == 255).all()
    assert (fitted[15:, :, 3] == 0).all()


def test_stretch_maps_the_whole_image_to_the_whole_frame() -> None:
    fitted = Fitting.plan(Resolution(200, 100), Resolution(50, 50), "stretch").fit_image(gradient(Resolution(200, 100)))
    assert fitted[25, 0, 0] <= 4
    assert fitted[25, -1, 0] >= 251
    assert fitted[0, 25, 1] <= 4
    assert fitted[-1, 25, 1] >= 251


@pytest.mark.parametrize("planes", [3, 4])
@pytest.mark.parametrize("side", [1, 2, 4, 64])
def test_white_stays_white_at_any_reduction(side: int, planes: int) -> None:
    white = np.full((4000, 3000, planes), 255, np.uint8)
    small = Fitting.plan(size_of(white), Resolution(side, side), "stretch").fit_image(white)
    assert small.min() == 255


def test_strong_reduction_is_close_to_single_pass_lanczos() -> None:
    y, x = np.mgrid[0:1500, 0:1500]
    waves = np.stack([np.sin(x / 37 + y / 91), np.cos(x * y / 20_000), np.sin((x + y) / 9)], -1)
    pixels = (127 + 120 * waves).astype(np.uint8)
    small = Fitting.plan(size_of(pixels), Resolution(128, 128), "stretch").fit_image(pixels)
    exact = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.LANCZOS))
    assert np.abs(small.astype(int) - exact).mean() < 1


def test_pad_mask_repaints_the_bars_and_follows_the_image() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :10] = 255
    fitted = Fitting.plan(Resolution(20, 10), Resolution(20, 20), "pad").fit_mask(mask)
    assert (fitted[:5] == 255).all()
    assert (fitted[15:] == 255).all()
    assert (fitted[5:15, :10] == 255).all()
    assert (fitted[5:15, 10:] == 0).all()


# --- masks at other sizes ---------------------------------------------------------------------------------------------


def covering(mask: Pixels, size: Resolution) -> Pixels:
    """Apply the rule of scale_mask pixel by pixel."""
    height, width = mask.shape
    found = np.zeros((size.height, size.width), np.uint8)
    for row in range(size.height):
        top, bottom = row * height // size.height, math.ceil((row + 1) * height / size.height)
        for column in range(size.width):
            left, right = column * width // size.width, math.ceil((column + 1) * width / size.width)
            found[row, column] = mask[top:bottom, left:right].max()
    return found


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.randoms(use_true_random=False)
)
def test_scaled_mask_is_set_where_it_covers_a_set_pixel(
    width: int, height: int, w: int, h: int, random: object
) -> None:
    seed = random.randrange(2**32)  # type: ignore[attr-defined]
    mask = np.where(np.random.default_rng(seed).random((height, width)) < 0.1, 255, 0).astype(np.uint8)
    assert np.array_equal(scale_mask(mask, Resolution(w, h)), covering(mask, Resolution(w, h)))


@given(SIZES, SIZES, st.data())
def test_single_mask_pixel_never_vanishes(source: Resolution, target: Resolution, data: st.DataObject) -> None:
    mask = np.zeros((source.height, source.width), np.uint8)
    mask[data.draw(st.integers(0, source.height - 1)), data.draw(st.integers(0, source.width - 1))] = 255
    assert scale_mask(mask, target).any()


def test_scale_mask_uses_only_the_box() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[3, 5] = 255
    assert scale_mask(mask, Resolution(2, 2), (4, 0, 8, 8)).tolist() == [[255, 0], [0, 0]]
    assert not scale_mask(mask, Resolution(2, 2), (0, 0, 4, 8)).any()


# --- frame to canvas and back -----------------------------------------------------------------------------------------


def test_frame_of_the_canvas_size_is_unchanged_both_ways() -> None:
    pixels = noise(Resolution(64, 64))
    placement = Placement.plan(Resolution(64, 64), Resolution(64, 64), 8)
    assert np.array_equal(placement.place_image(pixels), pixels)
    assert np.array_equal(placement.extract_frame(pixels), pixels)


def test_frame_rounded_up_to_the_multiple_is_not_resampled() -> None:
    pixels = noise(Resolution(61, 59))
    placement = Placement.plan(Resolution(61, 59), Resolution(64, 64), 8)
    canvas = placement.place_image(pixels)
    assert canvas.shape == (64, 64, 3)
    assert np.array_equal(placement.extract_frame(canvas), pixels)
    assert np.array_equal(canvas[0], canvas[2])  # the edges are repeated
    assert np.array_equal(canvas[:, -1], canvas[:, -2])


@given(SIZES, st.integers(1, 8), st.integers(1, 8))
def test_canvas_and_back_gives_the_frame_size(frame: Resolution, columns: int, rows: int) -> None:
    canvas = Resolution(columns * 8, rows * 8)
    placement = Placement.plan(frame, canvas, 8)
    left, top, width, height = placement.inner
    assert left >= 0
    assert top >= 0
    assert left + width <= canvas.width
    assert top + height <= canvas.height
    placed = placement.place_image(noise(frame))
    assert placed.shape == (canvas.height, canvas.width, 3)
    assert size_of(placement.extract_frame(placed)) == frame
    assert placement.place_mask(np.zeros((frame.height, frame.width), np.uint8)).shape == (canvas.height, canvas.width)


@pytest.mark.parametrize(
    "frame", [Resolution(400, 100), Resolution(100, 400), Resolution(333, 257), Resolution(20, 15)]
)
def test_canvas_and_back_keeps_shape_and_position(frame: Resolution) -> None:
    pixels = gradient(frame)
    placement = Placement.plan(frame, Resolution(128, 128), 8)
    _, _, width, height = placement.inner
    assert abs(width / height - frame.width / frame.height) < 0.05 * frame.width / frame.height
    assert np.abs(placement.extract_frame(placement.place_image(pixels)).astype(int) - pixels).mean() < 4


def test_mask_at_the_frame_edge_reaches_the_canvas_edge() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :5] = 255
    placed = Placement.plan(Resolution(20, 10), Resolution(24, 16), 8).place_mask(mask)
    assert (placed[:, :7] == 255).all()
    assert (placed[:, 7:] == 0).all()
