"""Measure edits in one process, with ovserve's device code but without server, link and spool.

    python -m benchmarks.in_process --engine genai --side_px 512 --edits 30

It is the baseline for the time that a server adds. Prints a JSON object for benchmarks/run.py: the seconds of each edit
from encoded upload to base64 text, and the part of them that was encoding.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import time
from pathlib import Path

from benchmarks.edits import BUILTIN_PATH, picture, prompt
from ovserve.engines.choice import choose_engine
from ovserve.engines.protocol import Engine
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import Blob
from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.request import ImageRequest
from ovserve.worker.prepare import prepare


def make_engine(profile: ModelProfile, model: ModelSettings) -> Engine:
    """Load the engine that a worker would choose."""
    name, _ = choose_engine(profile, model)
    engine: Engine
    if name == "stepwise":
        from ovserve.engines.stepwise.engine import StepwiseEngine

        engine = StepwiseEngine(profile, model)
    else:
        from ovserve.engines.genai import GenaiEngine

        engine = GenaiEngine(profile, model)
    engine.load(lambda _phase: None)
    return engine


def main() -> None:
    """Load the engine, then make one edit after another; the first two are dropped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("auto", "genai", "stepwise"), default="auto", help="(%(default)s)")
    parser.add_argument("--side_px", type=int, default=512, help="side of upload and result (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (%(default)s)")
    parser.add_argument("--edits", type=int, default=30, help="edits that are measured (%(default)s)")
    options = parser.parse_args()
    model = ModelSettings(name="builtin", path=BUILTIN_PATH, engine=options.engine)
    profile, settings = read_profile(model), WorkerSettings.of(Settings(models=(model,)))
    engine = make_engine(profile, model)
    whole, encoding = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        blobs = SpoolBlobs((folder,))
        for index in range(options.edits + 2):
            data = picture(options.side_px, 0, index)
            upload = Blob(f"{index:024x}", 0, len(data))
            (Path(folder) / upload.id).write_bytes(data)
            request = ImageRequest(
                task="edit",
                prompt=prompt(index),
                images=(upload,),
                width=options.side_px,
                height=options.side_px,
                seed=index,
                num_inference_steps=options.steps,
                guidance_scale=3.0,
                strength=0.7,
            )
            began = time.perf_counter()
            edit = prepare(request, profile, model, settings, engine, blobs=blobs)
            engine.admit(edit.work("job", 0))
            outcomes = engine.turn()
            while not outcomes:
                outcomes = engine.turn()
            pixels = outcomes[0].pixels
            if pixels is None:
                raise SystemExit(f"the engine made no picture: {outcomes[0].error}")
            result = edit.assemble(pixels)
            before = time.perf_counter()
            encoded = edit.encode(result, 0)
            base64.b64encode(encoded)
            done = time.perf_counter()
            if index >= 2:
                whole.append(done - began)
                encoding.append(done - before)
    engine.close()
    print(json.dumps({"series": {"in process": {"values": whole}, "in process, encoding": {"values": encoding}}}))


if __name__ == "__main__":
    main()
