"""Export the trained model as OpenVINO IR with 16-bit weights, in the diffusers layout that openvino_genai loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from scripts.builtin_model.autoencoder import VAE_SCALE_FACTOR, Autoencoder
from scripts.builtin_model.channels_last import put_channels_last
from scripts.builtin_model.denoiser import TEXT_WIDTH, TRAIN_TIMESTEPS, Denoiser, text_config
from scripts.builtin_model.scenes import PICTURE_PX
from scripts.builtin_model.tokenizer import convert_tokenizer_files
from scripts.builtin_model.training import load_checkpoint

LOG_VARIANCE = -30.0  # of the encoder's latents: the library samples from a distribution; this makes its width zero
DIFFUSERS_VERSION = "0.42.1"  # the version whose class names model_index.json uses
DYNAMIC = -1


class TextEncoder(nn.Module):
    """The text encoder: token ids to the last hidden state."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.text_encoder = denoiser.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode int64 (N, window) to float (N, window, TEXT_WIDTH)."""
        hidden: Tensor = self.text_encoder(input_ids)[0]
        return hidden


class UNet(nn.Module):
    """The UNet, including the conversion of latents to patches."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Predict v for float (N, C, H, W) and one timestep per row."""
        return self.denoiser.predict(sample, timestep, encoder_hidden_states)


class Encoder(nn.Module):
    """The encoder, including the normalisation by the latents' mean and scale."""

    def __init__(self, autoencoder: Autoencoder, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.autoencoder, self.mean, self.scale = autoencoder, mean, scale

    def forward(self, sample: Tensor) -> Tensor:
        """Encode float (N, 3, H, W) in -1..1 to (N, 2 C, H/16, W/16): means, then log-variances."""
        latents = (self.autoencoder.encode(sample) - self.mean) / self.scale
        return torch.cat([latents, torch.full_like(latents, LOG_VARIANCE)], 1)


class Decoder(nn.Module):
    """The decoder, including the latents' mean and scale."""

    def __init__(self, autoencoder: Autoencoder, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.autoencoder, self.mean, self.scale = autoencoder, mean, scale

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode normalised latents to float (N, 3, 16H, 16W)."""
        return self.autoencoder.decode(latent_sample * self.scale + self.mean)


def main() -> None:
    """Parse the command line, and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="contains denoiser.pt and tokenizer/")
    parser.add_argument(
        "--autoencoder", default="autoencoder.pt", help="checkpoint of the autoencoder in the folder (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the model; created if missing")
    options = parser.parse_args()
    export(options.folder, options.out, options.autoencoder)
    for path in sorted(options.out.rglob("*.bin")):
        print(f"{path.stat().st_size:>9} {path.relative_to(options.out)}")


@torch.no_grad()
def export(folder: Path, out: Path, autoencoder_name: str = "autoencoder.pt") -> None:
    """Write the model directory, except ovserve.json and the model card, which are maintained by hand."""
    checkpoint = load_checkpoint(folder / "denoiser.pt")
    mean, scale = checkpoint["mean"], checkpoint["scale"]
    denoiser = Denoiser.from_checkpoint(checkpoint).eval()
    autoencoder = Autoencoder.from_checkpoint(load_checkpoint(folder / autoencoder_name)).eval()
    side = PICTURE_PX // VAE_SCALE_FACTOR
    floats, integers = openvino.Type.f32, openvino.Type.i64
    channels, window = denoiser.latent_channels, denoiser.window
    latents = ([DYNAMIC, channels, DYNAMIC, DYNAMIC], floats)
    text = ([DYNAMIC, window, TEXT_WIDTH], floats)
    _convert(
        TextEncoder(denoiser),
        {"input_ids": torch.zeros(2, window, dtype=torch.long)},
        {"input_ids": ([DYNAMIC, window], integers)},
        "last_hidden_state",
        out / "text_encoder",
    )
    _convert(
        UNet(denoiser),
        {
            "sample": torch.randn(2, channels, side, side),
            "timestep": torch.tensor([5, 5]),
            "encoder_hidden_states": torch.randn(2, window, TEXT_WIDTH),
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
        {"latent_sample": torch.randn(1, channels, side, side)},
        {"latent_sample": latents},
        "sample",
        out / "vae_decoder",
    )
    convert_tokenizer_files(folder / "tokenizer", out / "tokenizer")
    _write_configs(out, denoiser, side, checkpoint["schedule"])


def _convert(
    module: nn.Module,
    example: dict[str, Tensor],
    inputs: dict[str, tuple[list[int], openvino.Type]],
    output: str,
    folder: Path,
) -> None:
    """Trace a module, name its ports, make its dimensions dynamic, put channels innermost after norms, and save it.

    8-bit weights would need half the space, but a call would take a fifth longer, because the plugin unpacks them in
    each call.
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


def _write_configs(out: Path, denoiser: Denoiser, side: int, schedule: dict[str, Any]) -> None:
    """Write the JSON files beside the IR, with everything that a pipeline cannot read from the graphs."""
    vae = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": denoiser.latent_channels,
        "scaling_factor": 1.0,
        # The library reads only the length: the scale factor is 2 ** (length - 1).
        "block_out_channels": [32] * (VAE_SCALE_FACTOR.bit_length()),
    }
    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
        },
        "text_encoder/config.json": {
            **text_config(denoiser.vocabulary_size, denoiser.window),
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "in_channels": denoiser.latent_channels,
            "out_channels": denoiser.latent_channels,
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
            # Not "trailing": for some numbers of steps the library's loop would run one timestep too many.
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
