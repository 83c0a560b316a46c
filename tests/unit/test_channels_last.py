"""Rewriting the built-in model's graph changes the memory layout of channels, but not the result."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from scripts.builtin_model.channels_last import put_channels_last

CHANNELS, GROUPS = 8, 4


def graph(*, scaled: bool, swish: bool, shared: bool = False, factor: float = 1.0) -> ov.Model:
    """Norm, scale and shift, Swish, as in a UNet's residual block; `shared`: another node reads the norm too."""
    rng = np.random.default_rng(1)
    data = ops.parameter(ov.PartialShape([-1, CHANNELS, -1, -1]), np.float32)
    per_row = ops.parameter(ov.PartialShape([-1, CHANNELS, 1, 1]), np.float32)
    gamma, beta = (ops.constant(rng.standard_normal(CHANNELS).astype(np.float32)) for _ in range(2))
    norm = last = ops.group_normalization(data, gamma, beta, GROUPS, 1e-5)
    if scaled:
        last = ops.add(ops.multiply(last, ops.add(per_row, ops.constant(np.float32(1)))), per_row)
    if swish:
        last = ops.swish(last, ops.constant(np.float32(factor)))
    results = [ops.result(last), *([ops.result(ops.abs(norm))] if shared else [])]
    return ov.Model(results, [data, per_row])


def run(model: ov.Model) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    rng = np.random.default_rng(2)
    feed = [
        rng.standard_normal((3, CHANNELS, 5, 7)).astype(np.float32),
        rng.standard_normal((3, CHANNELS, 1, 1)).astype(np.float32),
    ]
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled(feed).values()]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("swish", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_rewritten_graph_gives_the_same_result(scaled: bool, swish: bool, shared: bool) -> None:
    before = graph(scaled=scaled, swish=swish, shared=shared)
    expected = run(before)
    after = before.clone()
    assert put_channels_last(after) == 1
    assert "GroupNormalization" not in {node.get_type_name() for node in after.get_ops()}
    for one, other in zip(run(after), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_nodes_after_a_norm_have_the_channels_innermost() -> None:
    model = graph(scaled=True, swish=True)
    put_channels_last(model)
    swish = next(node for node in model.get_ops() if node.get_type_name() == "Swish")
    assert str(swish.output(0).get_partial_shape()[3]) == str(CHANNELS)


def test_a_swish_keeps_its_factor() -> None:
    before = graph(scaled=False, swish=True, factor=2.0)
    expected = run(before)
    put_channels_last(before)
    np.testing.assert_allclose(run(before)[0], expected[0], atol=1e-5)
