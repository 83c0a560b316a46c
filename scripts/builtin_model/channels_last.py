"""Rewrite the normalisations in a UNet's graph so that the nodes after them work with the channels innermost.

The CPU plugin (2026.4.1) turns a GroupNormalization into element-wise operations that run once for each channel of each
row, on the few positions of a small latent. With the channels innermost they run once for each position, on all
channels: a call of the built-in model's UNet takes a fifth to a third less time, with the largest gain for several rows
in a call. The arithmetic stays the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops

__all__ = ["put_channels_last"]

_CHANNELS = 1  # the axis, in the graph's own order


def put_channels_last(model: openvino.Model) -> int:
    """Rewrite every GroupNormalization in place, with the scale, shift and Swish after it. Return their number.

    The scale and the shift are those of `resnet_time_scale_shift="scale_shift"`: float (N, C, 1, 1), multiplied and
    added.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupNormalization"]
    for node in found:
        _rewrite(node)
    model.validate_nodes_and_infer_types()
    return len(found)


def _rewrite(norm: Any) -> None:
    data, gamma, beta = (norm.input_value(index) for index in range(3))
    attributes = norm.get_attributes()
    grouped = ops.reshape(data, _integers(0, attributes["num_groups"], -1), special_zero=True)
    even = ops.mvn(
        grouped, _integers(2), normalize_variance=True, eps=float(attributes["epsilon"]), eps_mode="inside_sqrt"
    )
    whole = ops.reshape(even, ops.shape_of(data, "i64"), special_zero=False)
    result = ops.add(ops.multiply(_inwards(whole), gamma), beta)
    last = norm
    multiply = _only_user(last, "Multiply")
    add = _only_user(multiply, "Add") if multiply is not None else None
    scale = _other_input(multiply, last) if multiply is not None else None
    shift = _other_input(add, multiply) if add is not None else None
    if shift is not None and _is_per_channel(scale) and _is_per_channel(shift):
        result = ops.add(ops.multiply(result, _inwards(scale)), _inwards(shift))
        last = add
    swish = _only_user(last, "Swish")
    if swish is not None and _is_plain(swish):
        result = ops.swish(result)
        last = swish
    outwards = ops.transpose(result, _integers(0, 3, 1, 2))
    for user in list(last.output(0).get_target_inputs()):
        user.replace_source_output(outwards.output(0))


def _integers(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def _inwards(port: Any) -> Any:
    return ops.transpose(port, _integers(0, 2, 3, 1))


def _only_user(node: Any, kind: str) -> Any:
    """Return the only node that reads this one, if there is one and it is of this kind."""
    users = [user.get_node() for user in node.output(0).get_target_inputs()]
    return users[0] if len(users) == 1 and users[0].get_type_name() == kind else None


def _other_input(node: Any, known: Any) -> Any:
    first, second = node.input_value(0), node.input_value(1)
    return second if first.get_node() == known else first


def _is_per_channel(port: Any) -> bool:
    shape = port.get_partial_shape()
    return shape.rank.is_static and len(shape) == 4 and all(str(side) == "1" for side in list(shape)[_CHANNELS + 1 :])


def _is_plain(swish: Any) -> bool:
    """Return whether it is x * sigmoid(x), without another factor inside the sigmoid."""
    if swish.get_input_size() == 1:
        return True
    factor = swish.input_value(1).get_node()
    return factor.get_type_name() == "Constant" and bool((factor.data == 1).all())
