"""Measure the share of the machine's peak rate that the UNet reaches, in floating-point operations per second.

    python -m benchmarks.bench_limit --model DIRECTORY --side_px 256 --rows 2 --save

The peak is the best rate of large matrix products through the same library, at the same precision (bf16 by default), on
all cores. The UNet's operations are counted from its graph: convolutions, matrix products and attention; a
multiplication with its addition counts as two.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from benchmarks import metadata
from benchmarks.edits import BUILTIN_PATH
from benchmarks.results import Result
from ovserve.engines.stepwise.compiled import Components, Layout
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings

SIDES = (1024, 2048, 3072)  # of the matrices: the size with the best rate differs between machines
MIN_DURATION_S = 0.5  # of each measurement


def count_operations(model: Any) -> float:
    """Return the floating-point operations of one inference of a model with static shapes."""
    return float(sum(_operations_of(node) for node in model.get_ops()))


def _operations_of(node: Any) -> int:
    kind = node.get_type_name()
    if kind in ("Convolution", "GroupConvolution"):
        # Weights are (out, in, kernel...) or (groups, out, in, kernel...): each output value is a sum over in x kernel.
        weights = list(node.input(1).get_shape())
        return 2 * math.prod(node.output(0).get_shape()) * math.prod(weights[2 if kind == "GroupConvolution" else 1 :])
    if kind == "MatMul":
        left = list(node.input(0).get_shape())
        inner = left[-2] if node.get_attributes().get("transpose_a") else left[-1]
        return 2 * math.prod(node.output(0).get_shape()) * inner
    if kind == "ScaledDotProductAttention":
        query, key = list(node.input(0).get_shape()), list(node.input(1).get_shape())
        return 4 * math.prod(query) * key[-2]
    return 0


def best_rate(run: Callable[[], object], repeats: int) -> float:
    """Return calls per second, the best of `repeats` measurements."""
    run()
    best = 0.0
    for _ in range(repeats):
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < MIN_DURATION_S:
            run()
            count += 1
        best = max(best, count / (time.perf_counter() - began))
    return best


def measure_peak(core: Any, precision: str, repeats: int) -> float:
    """Return the floating-point operations per second of large matrix products."""
    peak = 0.0
    for side in SIDES:
        left = ops.parameter(ov.PartialShape([side, side]), np.float32)
        right = ops.constant(np.random.default_rng(0).standard_normal((side, side)).astype(np.float32))
        model = ov.Model([ops.result(ops.matmul(left, right, transpose_a=False, transpose_b=True))], [left])
        request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
        values = np.ones((side, side), np.float32)
        peak = max(peak, 2.0 * side**3 * best_rate(partial(request.infer, {0: values}, share_inputs=True), repeats))
    return peak


def measure(result: Result, options: argparse.Namespace) -> None:
    """Add the peak, the operations of a UNet call and their rate to the result, with calls as the engine makes them."""
    settings = ModelSettings(name="model", path=options.model or BUILTIN_PATH, engine="stepwise")
    components = Components(read_profile(settings), settings)
    components.read()
    threads = components.cpu_threads()
    side = options.side_px or components.profile.native.width
    rows = options.rows
    latents = (rows, components.family.channels, side // components.vae.scale, side // components.vae.scale)
    feed = {name: values for name, values in components.feeds.of(rows).items() if name != "sample"}
    feed["sample"] = np.random.default_rng(0).standard_normal(latents).astype(np.float32)
    graph = components.core.read_model(components.profile.directory / components.family.denoiser / "openvino_model.xml")
    graph.reshape({name: list(values.shape) for name, values in feed.items()})
    operations = count_operations(graph)
    request = components.compile_denoiser(Layout(1, threads))[0]
    rate = best_rate(partial(components.family.run, request, feed), options.repeats)
    peak = measure_peak(components.core, options.precision, options.repeats)
    case = {"side_px": side, "rows": rows}
    result.add("operations of a call", [operations], unit="", better="none", case=case)
    result.add("rate of operations", [operations * rate], unit="1/s", better="higher", case=case)
    result.add("peak rate of operations", [peak], unit="1/s", better="none", case={"precision": options.precision})
    result.add("share of the peak", [operations * rate / peak], unit="", better="higher", case=case)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: the built-in model")
    parser.add_argument("--side_px", type=int, default=0, help="side of the picture; default: the model's native size")
    parser.add_argument("--rows", type=int, default=2, help="rows in a UNet call (%(default)s)")
    parser.add_argument("--precision", default="bf16", help="of the peak (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each rate (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("limit-full-size" if options.model else "limit", metadata.collect(options.model))
    measure(result, options)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
