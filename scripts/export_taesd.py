"""Export a tiny autoencoder (TAESD) for the options `vae` and `preview_vae`.

    python scripts/export_taesd.py madebyollin/taesd DIRECTORY

The first argument is a repository of diffusers' AutoencoderTiny, or a directory with one: madebyollin/taesd for SD 1
and 2, madebyollin/taesdxl, madebyollin/taesd3, madebyollin/taef1. Run it in an environment that has the packages below;
ovserve itself does not use them.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "diffusers==0.39.0", "openvino==2026.4.1"]
# ///

from __future__ import annotations

import json
import sys
from pathlib import Path

import openvino as ov
import torch
from diffusers import AutoencoderTiny

SCALE_PX, LEVELS = 8, 4  # side of the pixels of one cell of latents; resolutions, of which each halves the sides


class Part(torch.nn.Module):
    """One half of the autoencoder, as a module of its own."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Encode or decode."""
        found: torch.Tensor = self.part(values)
        return found


def export(part: torch.nn.Module, example: torch.Tensor, directory: Path, names: tuple[str, str]) -> None:
    """Write a graph with dynamic shapes; `names` are those of its input and its output."""
    with torch.no_grad():
        model = ov.convert_model(Part(part).eval(), example_input=example)
    model.inputs[0].get_tensor().set_names({names[0]})
    model.outputs[0].get_tensor().set_names({names[1]})
    model.reshape({0: ov.PartialShape([-1, example.shape[1], -1, -1])})
    directory.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, directory / "openvino_model.xml", compress_to_fp16=True)


def main() -> None:
    """Export the autoencoder named on the command line."""
    source, target = sys.argv[1], Path(sys.argv[2])
    tiny = AutoencoderTiny.from_pretrained(source).eval()
    channels = int(tiny.config.latent_channels)
    config = {
        "_class_name": "AutoencoderKL",  # the library knows no other
        "latent_channels": channels,
        "block_out_channels": [int(tiny.config.decoder_block_out_channels[0])] * LEVELS,
        "scaling_factor": 1.0,  # of latents as the denoiser has them
        "shift_factor": 0.0,
        "in_channels": 3,
        "out_channels": 3,
    }
    pixels, latents = torch.randn(1, 3, 8 * SCALE_PX, 8 * SCALE_PX), torch.randn(1, channels, 8, 8)
    export(tiny.encoder, pixels, target / "vae_encoder", ("sample", "latent_sample"))
    export(tiny.decoder, latents, target / "vae_decoder", ("latent_sample", "sample"))
    for part in ("vae_encoder", "vae_decoder"):
        (target / part / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    print(f"{target}: latents of {channels} channels")


if __name__ == "__main__":
    main()
