"""Write a small random Stable Diffusion pipeline with diffusers: `python tests/tinypipeline.py DIRECTORY`.

Runs in an environment with diffusers and transformers, such as the one in which pipelines are converted.
"""

# mypy: ignore-errors
from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer whose words are single letters."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def main() -> None:
    """Write the pipeline."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
        count = len(words)
        text = CLIPTextConfig(
            vocab_size=count, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=WIDTH, bos_token_id=count - 2, eos_token_id=count - 1, pad_token_id=count - 1,
        )  # fmt: skip
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                block_out_channels=(16, 16), down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=4, sample_size=64,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=words,
            unet=UNet2DConditionModel(
                block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=4, norm_num_groups=8, cross_attention_dim=WIDTH,
            ),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
