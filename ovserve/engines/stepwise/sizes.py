"""The sides that a UNet can work at, found in its graph when a worker loads the model.

A UNet halves its latents several times and joins the halves again on the way up. Most exports join them only if each
side could be halved exactly, so they need sides that are multiples of 16, 32 or 64 pixels; which one, no file says.
Runs in: worker, the device thread.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from ovserve.logs import fields
from ovserve.models.profile import ModelProfile, with_denoiser_multiple

__all__ = ["find_denoiser_multiple"]

log = logging.getLogger(__name__)

_BASE_CELLS = 16  # latent side to which a tried multiple is added: halved exactly more often than any multiple here
_MULTIPLES = (1, 2, 4, 8)  # in latent cells


def find_denoiser_multiple(profile: ModelProfile) -> ModelProfile:
    """Return the profile with the multiple that the model's UNet needs; the same one where there is nothing to find.

    That is the case if the multiple is declared, if the model works at one size only, and without a UNet.

    Tries sizes by shape inference alone, without compiling or running the graph.
    """
    path = profile.directory / "unet" / "openvino_model.xml"
    if not path.is_file() or profile.min_side_px == profile.max_side_px or _is_declared(profile):
        return profile
    try:
        cells = _find_multiple(ov.Core().read_model(path), path.parent)
    except RuntimeError:
        return profile  # the engine reads the file again and reports the reason
    found = with_denoiser_multiple(profile, cells * profile.side_multiple_px)
    log.info("working sizes found", extra=fields(model=profile.name, multiple_px=found.working_multiple_px))
    return found


def _find_multiple(unet: Any, directory: Path) -> int:
    """Return the multiple in latent cells: by shape inference, or, if that ends without sizes, by the configuration."""
    for cells in _MULTIPLES:
        takes = _takes(unet, cells)
        if takes is None:
            document = json.loads((directory / "config.json").read_text("utf-8"))
            blocks = document.get("block_out_channels")
            return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else 1
        if takes:
            return cells
    return _MULTIPLES[-1]


def _is_declared(profile: ModelProfile) -> bool:
    path = profile.directory / "ovserve.json"
    return path.is_file() and "side_multiple_px" in json.loads(path.read_text("utf-8")).get("sizes", {})


def _takes(unet: Any, cells: int) -> bool | None:
    """Return whether the UNet returns latents of the size it gets, for sides that are odd multiples of `cells`.

    None if shape inference cannot follow the sizes.
    """
    shape = unet.input("sample").get_partial_shape()
    if shape[2].is_static or shape[3].is_static:
        return True  # the export has one size, which the engine checks
    side = _BASE_CELLS + cells
    shape[2] = shape[3] = side
    trial = unet.clone()
    resized = [node for node in trial.get_ordered_ops() if node.get_type_name() == "Interpolate"]
    for node in resized:
        _decompress(node.input(1))
    try:
        trial.reshape({"sample": shape})
    except RuntimeError:
        return False
    shapes = [node.output(0).get_partial_shape() for node in resized]
    found = trial.output(0).get_partial_shape()
    if any(each[axis].is_dynamic for each in (*shapes, found) for axis in (2, 3)):
        return None
    return all(found[axis].get_length() == side for axis in (2, 3))


def _decompress(port: Any) -> None:
    """Replace a constant stored in fewer bits, which shape inference does not read, by one of float32."""
    source = port.get_source_output().get_node()
    if source.get_type_name() == "Convert":
        stored = source.input_value(0).get_node()
        if stored.get_type_name() == "Constant":
            port.replace_source_output(ops.constant(stored.data.astype(np.float32)).output(0))
