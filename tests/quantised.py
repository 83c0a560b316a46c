"""Quantised copies of small models, in the form that weight compression gives an export: int8 or int4 with scales.

A weight becomes Constant (int8 or int4) → Convert → Multiply by a scale. int8 has one scale for each output channel,
int4 one for each group of GROUP weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from tests.tinymodels import copy_model

__all__ = ["quantised_copy"]

GROUP = 16


def quantised_copy(source: Path, directory: Path, denoiser: str, bits: int) -> tuple[Path, int]:
    """Return a copy of a model with a quantised denoiser, and the number of weights that were quantised.

    Args:
        source: the model.
        directory: where to create the copy.
        denoiser: directory of the denoiser in the model.
        bits: 8 or 4.
    """
    copy_model(source, directory, {f"{denoiser}/config.json": {}})
    model = ov.Core().read_model(source / denoiser / "openvino_model.xml")
    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Convolution"):
            continue
        weights = _weights_of(node.input_value(1).get_node())
        if weights is None or not _can_quantise(node, weights, bits):
            continue
        made = _int8(weights, node) if bits == 8 else _int4(weights)
        node.input(1).replace_source_output(made.output(0))
        count += 1
    model.validate_nodes_and_infer_types()
    for suffix in (".xml", ".bin"):
        (directory / denoiser / f"openvino_model{suffix}").unlink()
    ov.save_model(model, directory / denoiser / "openvino_model.xml", compress_to_fp16=True)
    return directory, count


def _weights_of(node: Any) -> NDArray[np.float32] | None:
    """Return a constant's values, that of a converted float16 constant too; None if the node is not constant."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or not node.get_element_type().is_real():
        return None
    return np.array(node.data, np.float32)


def _can_quantise(node: Any, weights: NDArray[np.float32], bits: int) -> bool:
    if node.get_type_name() == "Convolution":
        return bits == 8
    is_linear = weights.ndim == 2 and node.get_attributes()["transpose_b"]
    return is_linear and (bits == 8 or weights.shape[1] % GROUP == 0)


def _int8(weights: NDArray[np.float32], _node: Any) -> Any:
    axes = tuple(range(1, weights.ndim))
    scale = np.maximum(np.abs(weights).max(axes, keepdims=True), 1e-8) / 127
    levels = np.round(weights / scale).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(levels), np.float32), ops.constant(scale.astype(np.float32)))


def _int4(weights: NDArray[np.float32]) -> Any:
    grouped = weights.reshape(len(weights), -1, GROUP)
    scale = np.maximum(np.abs(grouped).max(2, keepdims=True), 1e-8) / 7
    levels = np.round(grouped / scale).astype(np.int8)
    packed = ops.constant(levels, dtype=ov.Type.i4)
    scaled = ops.multiply(ops.convert(packed, np.float32), ops.constant(scale.astype(np.float32)))
    return ops.reshape(scaled, ops.constant(np.array(weights.shape, np.int64)), False)
