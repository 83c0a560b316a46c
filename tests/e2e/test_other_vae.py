"""The options `vae` and `preview_vae`: another autoencoder for pictures, and one for previews."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.genai import GenaiEngine
from ovserve.engines.protocol import Engine, Pixels, Preview
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.errors import ModelError
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.pictures import directory_of, settings_of, work_of
from tests.tinyvae import write_tiny_vae

MODEL = directory_of("sd")
RED = (0.8, -0.8, -0.8)


def loaded(engine: str, **options: Any) -> Engine:
    settings = dataclasses.replace(settings_of(MODEL, **options), engine=engine)
    made = (GenaiEngine if engine == "genai" else StepwiseEngine)(read_profile(settings), settings)
    made.load(lambda _phase: None)
    return made


def drawn(engine: Engine, mode: str, previews: list[Preview] | None = None, **options: Any) -> Pixels:
    work = work_of(read_profile(ModelSettings(name="m", path=MODEL)), mode, **options)
    if previews is not None:
        work.previews, work.on_preview = frozenset({1, 2}), previews.append
    engine.admit(work)
    while True:
        for outcome in engine.turn():
            assert outcome.pixels is not None, outcome.error
            return outcome.pixels


def is_red(pixels: Pixels) -> bool:
    """Return whether every pixel is about RED."""
    wanted = (np.array(RED) + 1) * 127.5
    return bool((np.abs(pixels.reshape(-1, 3) - wanted) < 30).all())


@pytest.mark.parametrize("engine", ["stepwise", "genai"])
def test_pictures_are_decoded_by_the_other_vae(tmp_path: Path, engine: str) -> None:
    vae = write_tiny_vae(tmp_path / "vae", levels=RED)
    made = loaded(engine, vae=vae)
    try:
        for mode in ("text2image", "image2image", "inpainting"):
            assert is_red(drawn(made, mode, num_inference_steps=2)), mode
    finally:
        made.close()


def test_previews_are_decoded_by_their_vae_and_pictures_are_not(tmp_path: Path) -> None:
    plain = loaded("stepwise")
    expected = drawn(plain, "text2image", num_inference_steps=4)
    plain.close()
    previews: list[Preview] = []
    made = loaded("stepwise", preview_vae=write_tiny_vae(tmp_path / "vae", levels=RED))
    try:
        picture = drawn(made, "text2image", previews, num_inference_steps=4)
        assert np.array_equal(picture, expected)
        assert not is_red(picture)
        while not previews:  # a preview of a picture that has ended is dropped: try again
            drawn(made, "text2image", previews, num_inference_steps=30)
        assert all(is_red(preview.pixels) for preview in previews)
    finally:
        made.close()


@pytest.mark.parametrize("option", ["vae", "preview_vae"])
def test_vae_for_latents_of_another_shape_is_refused(tmp_path: Path, option: str) -> None:
    vae = write_tiny_vae(tmp_path / "vae", levels=RED, channels=16)
    with pytest.raises(ModelError, match=rf"{option} .* has 16 channels of latents; the model's own VAE has 4"):
        read_profile(ModelSettings(name="m", path=MODEL, **{option: vae}))
    with pytest.raises(ModelError, match="component 'vae_decoder' is missing"):
        read_profile(ModelSettings(name="m", path=MODEL, **{option: tmp_path}))


def test_vae_without_an_encoder_leaves_generations(tmp_path: Path) -> None:
    vae = write_tiny_vae(tmp_path / "vae", levels=RED)
    (vae / "vae_encoder").rename(tmp_path / "elsewhere")
    assert read_profile(ModelSettings(name="m", path=MODEL, vae=vae)).tasks == {"text2image"}


def test_large_picture_is_decoded_in_tiles() -> None:
    wide = {"size": Resolution(320, 256), "num_inference_steps": 2}
    (whole, tiled) = (loaded("stepwise", vae_tile_px=side) for side in (0, 128))
    try:
        for mode in ("text2image", "image2image"):
            difference = np.abs(drawn(tiled, mode, **wide).astype(int) - drawn(whole, mode, **wide))
            assert difference.any()
            assert difference.mean() < 20  # of noise, which has no neighbourhood: the pictures of this model
        small = {"size": Resolution(128, 128), "num_inference_steps": 2}
        assert np.array_equal(drawn(tiled, "text2image", **small), drawn(whole, "text2image", **small))
    finally:
        whole.close()
        tiled.close()
