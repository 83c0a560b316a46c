"""A tiny autoencoder in the layout of an export: linear, from OpenVINO operations, with weights of our choice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

__all__ = ["write_tiny_vae"]

SCALE_PX = 8  # side of the pixels of one cell of latents


def write_tiny_vae(directory: Path, *, levels: tuple[float, float, float], channels: int = 4) -> Path:
    """Write a `vae_decoder` and a `vae_encoder`, and return the directory.

    Args:
        directory: where to write them.
        levels: colour of every decoded picture, -1 to 1, where the latents are 0; latents change it a little.
        channels: of the latents.
    """
    latents = ops.parameter(ov.PartialShape([-1, channels, -1, -1]), np.float32, name="latent_sample")
    weights = np.full((3, channels, 1, 1), 0.001, np.float32)
    mixed = ops.convolution(latents, ops.constant(weights), [1, 1], [0, 0], [0, 0], [1, 1])
    colour = ops.add(mixed, ops.constant(np.array(levels, np.float32).reshape(1, 3, 1, 1)))
    larger = ops.interpolate(
        colour,
        ops.constant(np.array([SCALE_PX, SCALE_PX], np.float32)),
        "nearest",
        "scales",
        axes=ops.constant(np.array([2, 3], np.int64)),
    )
    _save(directory / "vae_decoder", larger, latents, "latent_sample", "sample", channels)
    image = ops.parameter(ov.PartialShape([-1, 3, -1, -1]), np.float32, name="sample")
    weights = np.full((channels, 3, SCALE_PX, SCALE_PX), 1 / 64, np.float32)
    cells = ops.convolution(image, ops.constant(weights), [SCALE_PX, SCALE_PX], [0, 0], [0, 0], [1, 1])
    _save(directory / "vae_encoder", cells, image, "sample", "latent_sample", channels)
    return directory


def _save(directory: Path, node: ov.Node, parameter: ov.Node, given: str, made: str, channels: int) -> None:
    """Write the graph and the configuration, as for a TAESD: four levels, no scaling."""
    parameter.output(0).get_tensor().set_names({given})
    result = ops.result(node)
    result.output(0).get_tensor().set_names({made})
    directory.mkdir(parents=True)
    ov.save_model(ov.Model([result], [parameter]), directory / "openvino_model.xml", compress_to_fp16=False)
    config = {"latent_channels": channels, "block_out_channels": [64] * 4, "scaling_factor": 1.0, "shift_factor": 0.0}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
