"""Sample latents of scenes with the denoiser, paired with the correct pictures, to train the decoder on.

A decoder trained only on encoded pictures reproduces every irregularity of the denoiser's latents. Trained on these
pairs too, it makes straight edges. Scenes are noised only partly and denoised again, so that objects keep their
positions.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scripts.builtin_model.autoencoder import Autoencoder, tensor_from
from scripts.builtin_model.denoiser import Denoiser, sample_latents
from scripts.builtin_model.tokenizer import PromptEncoder
from scripts.builtin_model.training import Progress, choose_device, load_checkpoint, save_checkpoint
from scripts.builtin_model.worlds import WORLD_NAMES, World, load_world

__all__ = ["KEPT_SHARE", "sampled_scene"]

STRENGTHS = (0.35, 0.6)  # above this range, objects begin to move
STEPS = 12
BATCH = 32
KEPT_SHARE = 0.8  # the rest differs most from its picture, and may show another object or position


def sampled_scene(world: World, seed: int, number: int) -> tuple[Any, npt.NDArray[np.uint8]]:
    """Return scene `number` and its picture, uint8 (256, 256, 3); deterministic."""
    rng = random.Random(f"sampled/{seed}/{number}")
    composition = world.sample(rng)
    return composition, world.draw(composition, rng)


def main() -> None:
    """Parse the command line, and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="contains autoencoder.pt, denoiser.pt and tokenizer/"
    )
    parser.add_argument("--world", choices=WORLD_NAMES, default="shapes", help="what is drawn (%(default)s)")
    parser.add_argument("--scenes", type=int, default=4000, help="scenes to sample (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: the library's default")
    sample(parser.parse_args())


@torch.no_grad()
def sample(options: argparse.Namespace) -> None:
    """Write sampled.pt: `latents`, float16 (N, C, 16, 16), raw; `numbers` of the scenes, int32 (N,); and the `seed`."""
    device = choose_device(options.threads)
    world = load_world(options.world, options.folder)
    checkpoint = load_checkpoint(options.folder / "denoiser.pt")
    denoiser = Denoiser.from_checkpoint(checkpoint).to(device).eval()
    mean, scale = checkpoint["mean"].to(device), checkpoint["scale"].to(device)
    autoencoder = Autoencoder.from_checkpoint(load_checkpoint(options.folder / "autoencoder.pt")).to(device).eval()
    prompts = PromptEncoder(options.folder / "tokenizer")
    empty = torch.tensor(prompts.encode(""), device=device)
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    found, distances = [], []
    count = max(1, options.scenes // BATCH) * BATCH
    progress = Progress("sampled", count)
    for first in range(0, count, BATCH):
        scenes = [sampled_scene(world, options.seed, number) for number in range(first, first + BATCH)]
        encoded = autoencoder.encode(tensor_from(np.stack([picture for _, picture in scenes])).to(device))
        clean = (encoded - mean) / scale
        ids = [prompts.encode(world.caption(composition, rng, complete=True)) for composition, _ in scenes]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        drawn = sample_latents(
            denoiser,
            torch.tensor(ids, device=device),
            empty,
            noise,
            STEPS,
            start=clean,
            strength=rng.uniform(*STRENGTHS),
        )
        distances.append((drawn - clean).square().mean((1, 2, 3)).cpu())
        found.append((drawn * scale + mean).half().cpu())
        progress.advance(first + BATCH, distances[-1].mean())
    kept = torch.cat(distances).argsort()[: int(count * KEPT_SHARE)]
    content = {"latents": torch.cat(found)[kept], "numbers": kept.int(), "seed": options.seed}
    save_checkpoint(options.folder / "sampled.pt", content)


if __name__ == "__main__":
    main()
