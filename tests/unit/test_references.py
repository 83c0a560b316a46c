"""Reference images: their fitted pixels, and what an engine gets of a request with several images."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.errors import ImageError, UnsupportedParameter
from ovserve.pixels.references import REFERENCE_PIXELS, fit_reference
from ovserve.settings.options import Resolution
from tests.preparing import WIDE, StoreBlob, engine_of, noise, png, prepared, rejected, stored_blobs

# A model that edits by reference, takes three images and masks, and works at 64 to 2048 px in multiples of 16.
EDITOR = dataclasses.replace(WIDE, family="flux2-klein", references=3, max_side_px=2048)


@pytest.fixture
def blob() -> Iterator[StoreBlob]:
    yield from stored_blobs()


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), multiple=st.sampled_from([8, 16, 32]))
def test_fitted_sides_are_multiples_and_the_area_and_the_shape_are_kept(width: int, height: int, multiple: int) -> None:
    fitted = fit_reference(np.zeros((height, width, 3), np.uint8), multiple)
    down, across = fitted.shape[:2]
    assert across % multiple == down % multiple == 0
    assert across * down <= max(REFERENCE_PIXELS, multiple * max(across, down))
    scale = min(1.0, (REFERENCE_PIXELS / (width * height)) ** 0.5)
    for side, wanted in ((across, width * scale), (down, height * scale)):
        assert side == multiple or wanted - multiple < side <= wanted


def test_fitted_reference_is_the_image_itself_where_nothing_has_to_change() -> None:
    pixels = noise(96, 64)
    assert fit_reference(pixels, 16) is pixels
    assert np.array_equal(fit_reference(noise(96, 64, 3).copy()[:], 16).shape, (64, 96, 3))
    cut = fit_reference(pixels[:, :90], 16)
    assert np.array_equal(cut, pixels[:, 5:85])


def test_transparent_pixels_of_a_reference_are_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16, :, 3] = 255
    fitted = fit_reference(pixels, 16)
    assert fitted.shape == (32, 32, 3)
    assert (fitted[:16] == 0).all()
    assert (fitted[16:] == 255).all()


def test_every_image_is_a_reference_in_the_order_of_the_request(blob: StoreBlob) -> None:
    images = [noise(96, 64), noise(64, 64), noise(33, 80)]
    found = prepared(EDITOR, engine=engine_of(EDITOR, references=3), images=tuple(blob(png(each)) for each in images))
    assert found.mode == "image2image"
    assert found.strength == 1.0
    assert found.steps == 12
    first, second, third = found.reference_images
    assert np.array_equal(first, images[0])
    assert np.array_equal(second, images[1])
    assert np.array_equal(third, images[2][:, :32])
    assert found.image_tokens == (96 * 64 + 64 * 64 + 32 * 80) // 256  # those that each step sees
    assert found.work("a", 0).reference_images is found.reference_images
    assert found.pixel_bytes >= sum(each.nbytes for each in found.reference_images)


def test_first_image_keeps_its_shape_unless_the_request_says_how_to_fit_it(blob: StoreBlob) -> None:
    image = blob(png(noise(128, 64)))
    engine = engine_of(EDITOR, references=3)
    square = {"width": 64, "height": 64, "images": (image,)}
    assert prepared(EDITOR, engine=engine, **square).reference_images[0].shape == (64, 128, 3)
    assert prepared(EDITOR, engine=engine, resize_mode="pad", **square).reference_images[0].shape == (64, 64, 3)
    masked = prepared(EDITOR, engine=engine, mask=blob(png(np.full((64, 128), 255, np.uint8))), **square)
    assert masked.mode == "inpainting"
    assert masked.reference_images[0].shape == (64, 64, 3)
    assert np.array_equal(masked.reference_images[0], masked.initial_image)


def test_rotated_references_are_upright(blob: StoreBlob) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(noise(96, 64)).save(buffer, "PNG", exif=exif)
    plain = blob(png(noise(64, 64)))
    found = prepared(EDITOR, engine=engine_of(EDITOR, references=3), images=(plain, blob(buffer.getvalue())))
    assert found.reference_images[1].shape == (96, 64, 3)


def test_large_references_are_scaled_to_a_megapixel(blob: StoreBlob) -> None:
    small, large = blob(png(noise(64, 64))), blob(png(noise(2048, 1024)))
    found = prepared(EDITOR, engine=engine_of(EDITOR, references=3), images=(small, large))
    assert found.reference_images[1].shape == (720, 1440, 3)
    found = prepared(EDITOR, engine=engine_of(EDITOR, references=3), images=(large,))
    assert found.initial_image is not None
    assert found.initial_image.shape == (1024, 2048, 3)
    assert found.reference_images[0].shape == (720, 1440, 3)


def test_high_fidelity_raises_the_size_of_references(blob: StoreBlob) -> None:
    small, large = blob(png(noise(64, 64))), blob(png(noise(2048, 1024)))
    engine = engine_of(EDITOR, references=3)
    found = prepared(EDITOR, engine=engine, images=(small, large), input_fidelity="high")
    assert found.reference_images[1].shape == (1024, 2048, 3)
    shrunk = {"images": (large,), "width": 512, "height": 256}  # of a smaller result, the edited image keeps its detail
    assert prepared(EDITOR, engine=engine, **shrunk).reference_images[0].shape == (256, 512, 3)
    found = prepared(EDITOR, engine=engine, input_fidelity="high", **shrunk)
    assert found.reference_images[0].shape == (1024, 2048, 3)
    assert found.image_tokens == 1024 * 2048 // 256


def test_broken_reference_is_named_by_its_number(blob: StoreBlob) -> None:
    good, broken = blob(png(noise(64, 64))), blob(png(noise(64, 64))[:60])
    with pytest.raises(ImageError) as caught:
        prepared(EDITOR, engine=engine_of(EDITOR, references=3), images=(good, good, broken))
    assert caught.value.param == "image[2]"


def test_more_images_than_the_engine_takes_are_refused_with_their_number(blob: StoreBlob) -> None:
    image = blob(png(noise(64, 64)))
    rejected(UnsupportedParameter, "image", "2 images were sent", "no reference images", images=(image, image))
    with pytest.raises(UnsupportedParameter, match="3 images were sent; this model takes at most 2 reference images"):
        prepared(EDITOR, engine=engine_of(EDITOR, references=2), images=(image, image, image))


def test_model_that_starts_from_the_image_gets_no_references(blob: StoreBlob) -> None:
    assert prepared(WIDE, images=(blob(png(noise(64, 64))),)).reference_images == ()
    assert prepared(EDITOR, engine=engine_of(EDITOR, references=3), task="generation").reference_images == ()
    assert WIDE.native == Resolution(64, 64)
