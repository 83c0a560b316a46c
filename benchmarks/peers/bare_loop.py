"""Baseline: GenAI's pipeline called in a loop in one process.

    PEERS_ENVIRONMENT/bin/python -m benchmarks.peers.bare_loop --model DIR --kind edit:num_inference_steps=12

Prints one JSON object: for each edit, the seconds of `generate` alone and of the whole edit (decode, generate, encode,
base64).
"""

from __future__ import annotations

import argparse
import json
import time

from PIL import Image

from benchmarks.edits import parse_kind, picture, prompt
from benchmarks.peers.work import Pipelines, encode_reply, read_picture


def main() -> None:
    """Load the pipeline, warm up, and make edits for `--seconds`, at least `--min_edits` of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the loop (%(default)s)")
    parser.add_argument("--min_edits", type=int, default=3, help="smallest number of edits (%(default)s)")
    parser.add_argument("--kind", default="edit", help="kind of request, as in benchmarks/load.py (%(default)s)")
    options = parser.parse_args()
    kind = parse_kind(options.kind)
    began = time.perf_counter()
    pipelines = Pipelines(options.model)
    loaded = time.perf_counter()
    generate_s: list[float] = []
    whole_s: list[float] = []
    end = 0.0
    index = 0
    while index <= options.min_edits or time.perf_counter() < end:
        data = picture(kind.picture_px, kind.upload_bytes, index)
        fields = {"prompt": prompt(index), "seed": str(index), **kind.fields}
        start = time.perf_counter()
        image = read_picture(data, fields.get("size", ""))
        before = time.perf_counter()
        pixels = pipelines.generate(image, None, fields)
        after = time.perf_counter()
        json.dumps(encode_reply([Image.fromarray(one) for one in pixels]))
        done = time.perf_counter()
        if index == 0:  # dropped: the first inference repacks the weights
            end = done + options.seconds
            first = done - began
            cpu_before = time.process_time()
        else:
            generate_s.append(after - before)
            whole_s.append(done - start)
        index += 1
    cpu_s = (time.process_time() - cpu_before) / len(whole_s)
    times = {"load_s": loaded - began, "first_s": first, "cpu_s": cpu_s, "generate_s": generate_s, "whole_s": whole_s}
    print(json.dumps(times))


if __name__ == "__main__":
    main()
