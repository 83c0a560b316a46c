"""Draws the denoiser's training set and encodes it once: latents of scenes, latents of what they may be edited from, captions."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.builtin_model.autoencoder import Autoencoder, tensor_from
from scripts.builtin_model.captions import caption
from scripts.builtin_model.scenes import draw_composition, sample_composition, sample_edit
from scripts.builtin_model.tokenizer import PromptEncoder
from scripts.builtin_model.training import Progress, choose_device, load_checkpoint, save_checkpoint

SHARD = 128  # scenes that one process draws at a time: 50 MB of pictures
AHEAD = 2  # shards for each process that are begun or wait to be encoded
SHARD_LIMIT_S = 600.0  # to draw one takes a second or two: a process that needs this long is lost
CAPTIONS = 8  # of each scene


def main() -> None:
    """Parse the command line, then encode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="holds autoencoder.pt and tokenizer/; scenes.pt is written there"
    )
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    encode(options)


def encode(options: argparse.Namespace) -> None:
    """Write scenes.pt: `after` and `before`, float16 (N, 4, 16, 16) raw latents; `captions`, int16 (N, CAPTIONS, WINDOW)."""
    device = choose_device(options.threads)
    model = Autoencoder.from_checkpoint(load_checkpoint(options.folder / "autoencoder.pt")).to(device).eval()
    parts: list[dict[str, torch.Tensor]] = []
    shards = max(1, options.scenes // SHARD)
    progress = Progress("scenes", shards)
    with torch.no_grad():
        for number, shard in enumerate(_shards(options, shards)):
            latents = {
                name: torch.cat(
                    [model.encode(tensor_from(part).to(device)).half().cpu() for part in np.split(shard[name], 8)]
                )
                for name in ("after", "before")
            }
            parts.append({**latents, "captions": torch.from_numpy(shard["captions"])})
            progress.advance(number + 1, torch.tensor(0.0))
    content: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_checkpoint(options.folder / "scenes.pt", content)


def _shards(options: argparse.Namespace, shards: int) -> Iterator[dict[str, Any]]:
    """Shards in order, drawn by as many processes as there are processors to spare, never far ahead of the encoder."""
    tasks = [(options.seed, number, options.folder / "tokenizer") for number in range(shards)]
    processes = options.threads or os.cpu_count() or 1
    if processes == 1:
        yield from map(_draw_shard, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        drawn: deque[Any] = deque()
        for task in tasks:
            drawn.append(pool.apply_async(_draw_shard, (task,)))
            if len(drawn) > AHEAD * processes:
                yield drawn.popleft().get(SHARD_LIMIT_S)
        while drawn:
            yield drawn.popleft().get(SHARD_LIMIT_S)


def _draw_shard(task: tuple[int, int, Path]) -> dict[str, Any]:
    seed, number, tokenizer = task
    rng = random.Random(f"{seed}/{number}")
    encoder = PromptEncoder(tokenizer)
    after, before, captions = [], [], []
    for _ in range(SHARD):
        composition = sample_composition(rng)
        # Both with the same varied colours where nothing was edited, as in a real edit.
        paint = rng.getrandbits(32)
        after.append(draw_composition(composition, random.Random(paint)))
        before.append(draw_composition(sample_edit(composition, rng), random.Random(paint)))
        captions.append([encoder.encode(caption(composition, rng, complete=k == 0)) for k in range(CAPTIONS)])
    return {"after": np.stack(after), "before": np.stack(before), "captions": np.array(captions, np.int16)}


if __name__ == "__main__":
    main()
