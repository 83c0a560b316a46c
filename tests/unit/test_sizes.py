"""The working sides that a UNet's graph allows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from ovserve.engines.stepwise import sizes
from ovserve.engines.stepwise.sizes import find_denoiser_multiple
from ovserve.models.profile import ModelProfile, read_profile, with_denoiser_multiple
from ovserve.settings.options import ModelSettings, Resolution
from tests.preparing import PROFILE

MODELS = Path(__file__).parent.parent / "fixtures" / "models"


def profile_of(directory: Path) -> ModelProfile:
    return dataclasses.replace(
        PROFILE,
        directory=directory,
        side_multiple_px=8,
        native=Resolution(96, 96),
        min_side_px=40,
        max_side_px=200,
    )


def write_unet(directory: Path, halvings: int) -> None:
    """Write a graph that halves its sample, doubles it again and adds both, `halvings` times one inside the other."""
    sample = ops.parameter(ov.PartialShape([-1, 4, -1, -1]), np.float32, name="sample")
    sample.output(0).set_names({"sample"})

    def stage(node: ov.Node, left: int) -> ov.Node:
        if not left:
            return node
        half = ops.avg_pool(node, [2, 2], [0, 0], [0, 0], [2, 2], exclude_pad=False)
        scales = ops.constant(np.array([2, 2], np.float32))
        axes = ops.constant(np.array([2, 3], np.int64))
        doubled = ops.interpolate(stage(half, left - 1), scales, "nearest", "scales", axes=axes)
        return ops.concat([node, doubled], 1)

    found = ops.result(stage(sample, halvings))
    (directory / "unet").mkdir()
    ov.save_model(ov.Model([found], [sample]), directory / "unet" / "openvino_model.xml")


@pytest.mark.parametrize(("halvings", "multiple_px"), [(0, 8), (1, 16), (2, 32), (3, 64)])
def test_multiple_is_found_in_the_graph(tmp_path: Path, halvings: int, multiple_px: int) -> None:
    write_unet(tmp_path, halvings)
    found = find_denoiser_multiple(profile_of(tmp_path))
    assert found.working_multiple_px == multiple_px
    assert found.side_multiple_px == 8  # the mask stays on the latent grid
    for side in (found.native.width, found.native.height, found.min_side_px, found.max_side_px):
        assert side % multiple_px == 0
    for width, height in ((100, 60), (1, 3000), (33, 500), (199, 201)):
        size = found.working_size(width, height)
        assert (size.width % multiple_px, size.height % multiple_px) == (0, 0)
        assert found.min_side_px <= size.width <= found.max_side_px
        assert found.min_side_px <= size.height <= found.max_side_px


def test_multiple_follows_from_the_configuration_where_shapes_cannot_be_inferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_unet(tmp_path, 2)
    monkeypatch.setattr(sizes, "_decompress", lambda _: None)
    for document, multiple_px in (({"block_out_channels": [8, 8, 8]}, 32), ({}, 8)):
        (tmp_path / "unet" / "config.json").write_text(json.dumps(document), "utf-8")
        assert find_denoiser_multiple(profile_of(tmp_path)).working_multiple_px == multiple_px


def test_declared_multiple_is_not_searched(tmp_path: Path) -> None:
    write_unet(tmp_path, 3)
    (tmp_path / "ovserve.json").write_text(json.dumps({"sizes": {"side_multiple_px": 8}}), "utf-8")
    profile = profile_of(tmp_path)
    assert find_denoiser_multiple(profile) is profile


@pytest.mark.parametrize("content", [None, "<net"])
def test_model_without_a_readable_unet_is_left_to_the_engine(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "openvino_model.xml").write_text(content)
    profile = profile_of(tmp_path)
    assert find_denoiser_multiple(profile) is profile


@pytest.mark.parametrize("name", ["sd", "sdxl", "lcm", "inpaint"])
def test_unet_of_the_fixtures_needs_multiples_of_16(name: str) -> None:
    profile = read_profile(ModelSettings(name=name, path=MODELS / name))
    assert profile.working_multiple_px == 8
    assert find_denoiser_multiple(profile).working_multiple_px == 16


def test_range_narrower_than_the_multiple_becomes_one_size() -> None:
    narrow = dataclasses.replace(PROFILE, native=Resolution(40, 40), min_side_px=40, max_side_px=56)
    found = with_denoiser_multiple(dataclasses.replace(narrow, side_multiple_px=8), 64)
    assert (found.native, found.min_side_px, found.max_side_px) == (Resolution(64, 64), 64, 64)
