"""Measure what LoRA adapters cost: CPU time of a row of the UNet, and time to compile it, by their number and rank.

    python -m benchmarks.bench_lora --save

The adapters are random and change every attention and feed-forward layer. The baseline is the UNet without adapters.
Calls of all cases are interleaved, on one thread, so that other work on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import metadata
from benchmarks.edits import BUILTIN_PATH
from benchmarks.results import Result
from ovserve.engines.lora.adapters import Adapter, Pair
from ovserve.engines.lora.graph import adapt_model
from ovserve.engines.stepwise.compiled import Components
from ovserve.engines.stepwise.lora import with_weights
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings

CASES = ((0, 0), (1, 4), (1, 16), (1, 64), (3, 16), (8, 16), (8, 64))  # adapters and rank; no adapters first
LAYER = re.compile(r"(?:__module\.)?(?P<path>[^/]+\.(?:to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))/")
PROPERTIES = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}


def random_adapter(model: Any, rank: int, seed: int) -> Adapter:
    """Return an adapter of every attention and feed-forward layer of a model."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for operation in model.get_ops():
        match = LAYER.match(operation.get_friendly_name())
        if match and operation.get_type_name() == "MatMul":
            outputs, inputs = operation.input_value(1).get_shape()
            down = rng.normal(0, 0.02, (rank, inputs)).astype(np.float16)
            up = rng.normal(0, 0.02, (outputs, rank)).astype(np.float16)
            pairs[match["path"].replace(".", "_")] = Pair(match["path"], down, up, 1.0)
    return Adapter(Path("random"), {"denoiser": pairs})


def measure(result: Result, options: argparse.Namespace) -> None:
    """Add CPU seconds of a row, and seconds to compile, for each case."""
    settings = ModelSettings(name="model", path=options.model or BUILTIN_PATH, engine="stepwise")
    components = Components(read_profile(settings), settings)
    components.read()
    path = components.profile.directory / components.family.denoiser / "openvino_model.xml"
    plain = components.core.read_model(path)
    feed = components.feeds.of(options.rows)
    runs = {}
    for count, rank in CASES:
        adapters = [random_adapter(plain, rank, seed) for seed in range(count)]
        began = time.perf_counter()
        model = adapt_model(plain, "denoiser", adapters) if count else plain
        compiled = components.core.compile_model(model, "CPU", PROPERTIES)
        compile_s = time.perf_counter() - began
        inputs = with_weights(feed, np.full((options.rows, count), 0.5, np.float32)) if count else feed
        runs[count, rank] = compiled.create_infer_request(), inputs, compile_s
        components.family.run(*runs[count, rank][:2])  # makes the kernels
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            request, inputs, _ = runs[case]
            began = time.process_time()
            components.family.run(request, inputs)
            seconds[case].append((time.process_time() - began) / options.rows)
    base = float(np.median(seconds[0, 0]))
    for count, rank in CASES:
        case = {"adapters": count, "rank": rank}
        values = seconds[count, rank]
        result.add("CPU time of a row", values, unit="s", better="lower", case=case)
        result.add(
            "CPU time of a row, against none", [float(np.median(values)) / base], unit="", better="lower", case=case
        )
        result.add("time to compile", [runs[count, rank][2]], unit="s", better="lower", case=case)


def main() -> None:
    """Measure, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: the built-in model")
    parser.add_argument("--rows", type=int, default=2, help="rows in a UNet call (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each case (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    result = Result("lora", metadata.collect(options.model))
    measure(result, options)
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
