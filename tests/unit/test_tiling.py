"""Tiles of the VAE: they cover a picture, blend smoothly, and leave no seam with a real VAE."""

from __future__ import annotations

from functools import partial

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ovserve.engines.stepwise.compiled import Components, Layout, run_decoder, run_encoder
from ovserve.engines.stepwise.tiling import Tiling, decode_tiles, encode_tiles
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings
from tests.pictures import directory_of, settings_of

SCALE = 8
RNG = np.random.default_rng(4)


def enlarge(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Decode without a neighbourhood: the first three channels, each cell as SCALE x SCALE pixels."""
    cells = np.clip(latents[0, :3], 0, 255).transpose(1, 2, 0)
    return np.rint(np.repeat(np.repeat(cells, SCALE, 0), SCALE, 1)).astype(np.uint8)


def shrink(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Encode without a neighbourhood: the mean of SCALE x SCALE pixels."""
    _, planes, height, width = image.shape
    cells = image.reshape(1, planes, height // SCALE, SCALE, width // SCALE, SCALE)
    return np.asarray(cells.mean(axis=(3, 5)), np.float32)


@settings(deadline=None, max_examples=40)
@given(height=st.integers(8, 60), width=st.integers(8, 60), tile=st.integers(8, 30))
def test_tiles_of_a_vae_that_sees_no_neighbours_give_the_same_picture(height: int, width: int, tile: int) -> None:
    tiling = Tiling.of(tile * SCALE, SCALE)
    latents = RNG.uniform(0, 255, (1, 4, height, width)).astype(np.float32)
    calls = []

    def decode(part: NDArray[np.float32]) -> NDArray[np.uint8]:
        calls.append(part.shape)
        return enlarge(part)

    assert np.array_equal(decode_tiles(decode, latents, tiling), enlarge(latents))
    assert (len(calls) > 1) == tiling.is_large(height, width)
    assert all(max(shape[2:]) <= tiling.cells for shape in calls) or len(calls) == 1
    image = RNG.uniform(-1, 1, (1, 3, height * SCALE, width * SCALE)).astype(np.float32)
    assert np.allclose(encode_tiles(shrink, image, tiling), shrink(image), atol=1e-5)


def test_neighbouring_tiles_of_other_brightness_change_by_less_than_a_level_a_pixel() -> None:
    brightness = iter([0, 60] * 50)
    tiling = Tiling.of(768, SCALE)

    def decode(part: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.full((part.shape[2] * SCALE, part.shape[3] * SCALE, 3), next(brightness), np.uint8)

    pixels = decode_tiles(decode, np.zeros((1, 4, 96, 256), np.float32), tiling).astype(int)
    assert pixels.min() == 0
    assert pixels.max() == 60
    assert np.abs(np.diff(pixels, axis=1)).max() <= 1


def test_zero_turns_tiles_off_and_small_pictures_are_decoded_whole() -> None:
    assert not Tiling.of(0, SCALE).is_large(10_000, 10_000)
    tiling = Tiling.of(ModelSettings().vae_tile_px, SCALE)
    assert not tiling.is_large(128, 192)  # 1024 x 1536 pixels
    assert tiling.is_large(256, 192)


@pytest.fixture(scope="module")
def components() -> Components:
    """The built-in model, compiled for one stream."""
    settings = settings_of(directory_of("builtin"), streams=1)
    found = Components(read_profile(settings), settings)
    found.read()
    found.compile(Layout(1, 1), lambda _phase: None)
    return found


def test_real_vae_leaves_no_seam(components: Components) -> None:
    """The difference to the whole picture changes by less than a level from pixel to pixel, on average along a seam."""
    request, vae = components.requests[0], components.vae
    smooth = np.linspace(-1, 1, 512, dtype=np.float32)
    image = np.stack([np.add.outer(smooth, smooth) / 2, np.subtract.outer(smooth, smooth) / 2, np.zeros((512, 512))])
    encode = partial(run_encoder, request.vae_encoder)
    whole = encode(image[None].astype(np.float32))
    tiling = Tiling.of(256, vae.scale)
    tiled = encode_tiles(encode, image[None].astype(np.float32), tiling)
    spread = float(whole[:, : vae.latent_channels].std())
    assert np.abs(tiled - whole)[:, : vae.latent_channels].mean() < 0.1 * spread
    latents = whole[:, : vae.latent_channels] * float(vae.scaling_factor)
    decode = partial(run_decoder, request.vae_decoder)
    difference = decode_tiles(decode, latents, tiling).astype(float) - decode(latents)
    assert difference.any()  # tiles were used
    for axis in (0, 1):
        steps = np.diff(difference, axis=axis).mean(axis=1 - axis)
        assert np.abs(steps).max() < 1.0
    assert isinstance(request.vae_decoder, ov.InferRequest)
