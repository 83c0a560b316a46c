"""Make a full-size SDXL with random weights, without a download.

    TORCH_ENVIRONMENT/bin/python -m benchmarks.peers.make_sdxl FOLDER

Writes FOLDER/diffusers (half-precision safetensors, 7 GB) and FOLDER/openvino (the same as OpenVINO IR, 7 GB). Its
pictures are noise, but time and memory depend only on shapes. Takes some minutes and 14 GB of memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.peers.make_sd15 import SEED, VOCABULARY, WINDOW, export, make_autoencoder
from scripts.builtin_model.tokenizer import write_tokenizer_files
from scripts.builtin_model.worlds import model_sizes


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    """Return the configuration of a CLIP text encoder whose projection is as wide as itself."""
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=WINDOW,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """Return the pipeline in half precision, with the shapes of SDXL's published configuration."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float16)  # the weights take half of the memory
    write_tokenizer_files(folder / "words", model_sizes("shapes").words, WINDOW)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=WINDOW)
    denoiser = UNet2DConditionModel(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=make_autoencoder(1024),
        text_encoder=CLIPTextModel(text_config(tokenizer, 768, 12, 12, "quick_gelu")).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 1280, 32, 20, "gelu")).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=denoiser.eval(),
        scheduler=schedule,
        add_watermarker=False,
    )


def main() -> None:
    """Write the model in both forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    folder = parser.parse_args().folder
    torch_form, openvino_form = folder / "diffusers", folder / "openvino"
    if not (torch_form / "model_index.json").exists():
        make_pipeline(folder).save_pretrained(torch_form)
    export(torch_form, openvino_form)


if __name__ == "__main__":
    main()
