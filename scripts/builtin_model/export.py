"""Exports the trained model as OpenVINO IR in the diffusers layout that openvino_genai loads, weights as 16-bit floats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from scripts.builtin_model.autoencoder import LATENT_CHANNELS, VAE_SCALE_FACTOR, Autoencoder
from scripts.builtin_model.channels_last import put_channels_last
from scripts.builtin_model.denoiser import TEXT_WIDTH, TRAIN_TIMESTEPS, Denoiser, text_config
from scripts.builtin_model.scenes import PICTURE_PX
from scripts.builtin_model.tokenizer import WINDOW, convert_tokenizer_files
from scripts.builtin_model.training import load_checkpoint

LOG_VARIANCE = -30.0  # of the encoder's latents: the library draws from a distribution, and this one has no width
MADE_FOR_DIFFUSERS = "0.42.1"  # the version whose class names model_index.json uses
DYNAMIC = -1


class TextEncoder(nn.Module):
    """Token ids to the last hidden state."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.text_encoder = denoiser.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 (N, WINDOW) to float (N, WINDOW, TEXT_WIDTH)."""
        hidden: Tensor = self.text_encoder(input_ids)[0]
        return hidden


class UNet(nn.Module):
    """The UNet with its patching inside."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Float (N, 4, H, W) and one timestep for each row, to v."""
        return self.denoiser.predict(sample, timestep, encoder_hidden_states)


class Encoder(nn.Module):
    """The encoder with the latents' mean and scale folded in."""

    def __init__(self, autoencoder: Autoencoder, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.autoencoder, self.mean, self.scale = autoencoder, mean, scale

    def forward(self, sample: Tensor) -> Tensor:
        """Float (N, 3, H, W) in -1..1 to (N, 8, H/16, W/16): means, then log-variances."""
        latents = (self.autoencoder.encode(sample) - self.mean) / self.scale
        return torch.cat([latents, torch.full_like(latents, LOG_VARIANCE)], 1)


class Decoder(nn.Module):
    """The decoder with the latents' mean and scale folded in."""

    def __init__(self, autoencoder: Autoencoder, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.autoencoder, self.mean, self.scale = autoencoder, mean, scale

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Normalised latents to float (N, 3, 16H, 16W)."""
        return self.autoencoder.decode(latent_sample * self.scale + self.mean)


def main() -> None:
    """Parse the command line, then export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="holds denoiser.pt and tokenizer/")
    parser.add_argument("--autoencoder", default="autoencoder.pt", help="its checkpoint in the folder")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model; made if absent")
    options = parser.parse_args()
    export(options.folder, options.out, options.autoencoder)
    for path in sorted(options.out.rglob("*.bin")):
        print(f"{path.stat().st_size:>9} {path.relative_to(options.out)}")


@torch.no_grad()
def export(folder: Path, out: Path, autoencoder_name: str = "autoencoder.pt") -> None:
    """Write the whole directory but ovserve.json and the model card, which are written by hand."""
    checkpoint = load_checkpoint(folder / "denoiser.pt")
    mean, scale = checkpoint["mean"], checkpoint["scale"]
    denoiser = Denoiser.from_checkpoint(checkpoint).eval()
    autoencoder = Autoencoder.from_checkpoint(load_checkpoint(folder / autoencoder_name)).eval()
    side = PICTURE_PX // VAE_SCALE_FACTOR
    floats, integers = openvino.Type.f32, openvino.Type.i64
    latents = ([DYNAMIC, LATENT_CHANNELS, DYNAMIC, DYNAMIC], floats)
    text = ([DYNAMIC, WINDOW, TEXT_WIDTH], floats)
    _convert(
        TextEncoder(denoiser),
        {"input_ids": torch.zeros(2, WINDOW, dtype=torch.long)},
        {"input_ids": ([DYNAMIC, WINDOW], integers)},
        "last_hidden_state",
        out / "text_encoder",
    )
    _convert(
        UNet(denoiser),
        {
            "sample": torch.randn(2, LATENT_CHANNELS, side, side),
            "timestep": torch.tensor([5, 5]),
            "encoder_hidden_states": torch.randn(2, WINDOW, TEXT_WIDTH),
        },
        {"sample": latents, "timestep": ([DYNAMIC], integers), "encoder_hidden_states": text},
        "out_sample",
        out / "unet",
    )
    _convert(
        Encoder(autoencoder, mean, scale),
        {"sample": torch.randn(1, 3, PICTURE_PX, PICTURE_PX)},
        {"sample": ([DYNAMIC, 3, DYNAMIC, DYNAMIC], floats)},
        "latent_parameters",
        out / "vae_encoder",
    )
    _convert(
        Decoder(autoencoder, mean, scale),
        {"latent_sample": torch.randn(1, LATENT_CHANNELS, side, side)},
        {"latent_sample": latents},
        "sample",
        out / "vae_decoder",
    )
    convert_tokenizer_files(folder / "tokenizer", out / "tokenizer")
    _write_configs(out, denoiser.vocabulary_size, side, checkpoint["schedule"])


def _convert(
    module: nn.Module,
    example: dict[str, Tensor],
    inputs: dict[str, tuple[list[int], openvino.Type]],
    output: str,
    folder: Path,
) -> None:
    """Trace a module, name and free its dimensions, put the channels of what is normalised innermost, save it.

    Weights of 8 bits would take half the space, and a call a fifth more time: the plugin unpacks them in each call.
    """
    model = openvino.convert_model(module.eval(), example_input=example)
    shapes = {}
    for port, (name, (shape, element_type)) in zip(model.inputs, inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_element_type(element_type)
        shapes[port] = openvino.PartialShape(shape)
    model.reshape(shapes)
    model.validate_nodes_and_infer_types()
    model.outputs[0].get_tensor().set_names({output})
    put_channels_last(model)
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=True)


def _write_configs(out: Path, vocabulary_size: int, side: int, schedule: dict[str, Any]) -> None:
    """The JSON files beside the IR: what a pipeline cannot see from the graphs."""
    vae = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "scaling_factor": 1.0,
        # Only the length is read: the library takes 2 ** (length - 1) for the scale factor.
        "block_out_channels": [32] * (VAE_SCALE_FACTOR.bit_length()),
    }
    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": MADE_FOR_DIFFUSERS,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
        },
        "text_encoder/config.json": {
            **text_config(vocabulary_size),
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "sample_size": side,
            "time_cond_proj_dim": None,
        },
        "vae_encoder/config.json": vae,
        "vae_decoder/config.json": vae,
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": TRAIN_TIMESTEPS,
            **schedule,
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 1,
            "prediction_type": "v_prediction",
            "thresholding": False,
            # Not "trailing": with some numbers of steps the library's loop then runs one timestep too many.
            "timestep_spacing": "leading",
            "rescale_betas_zero_snr": False,
        },
    }
    for name, config in configs.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
