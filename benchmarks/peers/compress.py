"""Make a copy of a model in OpenVINO IR with the weights of all its parts in int8, as `optimum-cli` does.

    ENVIRONMENT/bin/python -m benchmarks.peers.compress FOLDER COPY

Needs the packages openvino and nncf. Scales and zero points are those of each output channel.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import nncf
import openvino as ov

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder")
MODEL = ("openvino_model.bin", "openvino_model.xml")


def compress(part: Path, copy: Path) -> None:
    """Copy one part of a model with its weights in int8."""
    shutil.copytree(part, copy, ignore=shutil.ignore_patterns(*MODEL))
    model = ov.Core().read_model(part / "openvino_model.xml")
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    ov.save_model(model, copy / "openvino_model.xml", compress_to_fp16=True)


def main() -> None:
    """Copy the small files, and compress the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model")
    parser.add_argument("copy", type=Path, help="folder to write to")
    options = parser.parse_args()
    shutil.copytree(options.folder, options.copy, ignore=shutil.ignore_patterns(*PARTS))
    for name in PARTS:
        if (options.folder / name).is_dir():
            compress(options.folder / name, options.copy / name)


if __name__ == "__main__":
    main()
