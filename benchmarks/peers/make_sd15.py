"""Make a full-size Stable Diffusion 1.5 with random weights, without a download.

    TORCH_ENVIRONMENT/bin/python -m benchmarks.peers.make_sd15 FOLDER

Writes FOLDER/diffusers (half-precision safetensors, 2 GB) and FOLDER/openvino (the same as OpenVINO IR, 2 GB). Its
pictures are noise, but time and memory depend only on shapes, so every engine does the same work as with real weights.
Takes some minutes and 10 GB of memory. With --lcm it is a latent consistency model of this size, whose UNet has the
guidance scale as an input.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.builtin_model.tokenizer import write_tokenizer_files
from scripts.builtin_model.worlds import model_sizes

SEED = 15
VOCABULARY = 49_408  # size of the embedding table; the tokenizer uses the first few hundred entries
WINDOW = 77


def make_autoencoder(side_px: int) -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion, which SDXL has too, for pictures of a size."""
    autoencoder = AutoencoderKL(
        sample_size=side_px,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    return autoencoder.eval()


def export(torch_form: Path, openvino_form: Path) -> None:
    """Export a pipeline in half precision to OpenVINO IR."""
    exporter = Path(sys.executable).with_name("optimum-cli")
    options = ["export", "openvino", "--library", "diffusers", "--task", "text-to-image", "--weight-format", "fp16"]
    subprocess.run([exporter, *options, "--model", torch_form, openvino_form], check=True)


def make_pipeline(folder: Path, *, lcm: bool = False) -> StableDiffusionPipeline | LatentConsistencyModelPipeline:
    """Return the pipeline, with the shapes of Stable Diffusion 1.5's published configuration."""
    torch.manual_seed(SEED)
    write_tokenizer_files(folder / "words", model_sizes("shapes").words, WINDOW)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=WINDOW)
    encoder = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=WINDOW,
        projection_dim=768,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    denoiser = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        time_cond_proj_dim=256 if lcm else None,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if lcm:
        schedule = LCMScheduler(**betas, original_inference_steps=50)
    else:
        schedule = PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return (LatentConsistencyModelPipeline if lcm else StableDiffusionPipeline)(
        vae=make_autoencoder(512),
        text_encoder=CLIPTextModel(encoder).eval(),
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    """Write the model in both forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--lcm", action="store_true", help="make a latent consistency model")
    options = parser.parse_args()
    folder = options.folder
    torch_form, openvino_form = folder / "diffusers", folder / "openvino"
    pipeline = make_pipeline(folder, lcm=options.lcm)
    pipeline.to(torch.float16).save_pretrained(torch_form)
    del pipeline
    export(torch_form, openvino_form)
    settings = json.loads((openvino_form / "model_index.json").read_text("utf-8"))
    print(f"{settings['_class_name']} with random weights: {torch_form} and {openvino_form}")


if __name__ == "__main__":
    main()
