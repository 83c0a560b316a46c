"""Draw the denoiser's training set and encode it: latents of scenes and of their sources for edits, and captions."""

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
from scripts.builtin_model.tokenizer import PromptEncoder
from scripts.builtin_model.training import Progress, choose_device, load_checkpoint, save_checkpoint
from scripts.builtin_model.worlds import WORLD_NAMES, load_world

SHARD = 128  # scenes that one process draws at a time: 50 MB of pictures
AHEAD = 2  # shards per process that are being drawn or wait to be encoded
SHARD_TIMEOUT_S = 600.0  # drawing a shard takes a second or two; after this time its process has failed
CAPTIONS = 8  # captions per scene


def main() -> None:
    """Parse the command line, and encode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="contains autoencoder.pt and tokenizer/; scenes.pt is written there"
    )
    parser.add_argument("--world", choices=WORLD_NAMES, default="shapes", help="what is drawn (%(default)s)")
    parser.add_argument("--scenes", type=int, default=24_000, help="number of scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="processes and threads; 0: all processors")
    options = parser.parse_args()
    encode(options)


def encode(options: argparse.Namespace) -> None:
    """Write scenes.pt.

    It contains `after`, float16 (N, C, 16, 16), raw latents; `plain`, the number of scenes before those that are made
    from another picture; `before`, float16 (N - plain, C, 16, 16), the other pictures; and `captions`, int16 (N,
    CAPTIONS, window).
    """
    device = choose_device(options.threads)
    model = Autoencoder.from_checkpoint(load_checkpoint(options.folder / "autoencoder.pt")).to(device).eval()
    parts: list[dict[str, torch.Tensor]] = []
    shards = max(1, options.scenes // SHARD)
    progress = Progress("scenes", shards)
    with torch.no_grad():
        for number, shard in enumerate(_shards(options, shards)):
            latents = {
                name: torch.cat(
                    [model.encode(tensor_from(part).to(device)).half().cpu() for part in np.split(pictures, 8)]
                )
                for name, pictures in shard.items()
                if name != "captions"
            }
            parts.append({**latents, "captions": torch.from_numpy(shard["captions"])})
            progress.advance(number + 1, torch.tensor(0.0))
    content: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts if name in part]) for name in ("after", "before", "captions")
    }
    content["plain"] = SHARD * _plain_shards(shards)
    save_checkpoint(options.folder / "scenes.pt", content)


def _plain_shards(shards: int) -> int:
    """Return how many shards, from the first, have scenes for pictures that are made from noise: half of them."""
    return -(-shards // 2)


def _shards(options: argparse.Namespace, shards: int) -> Iterator[dict[str, Any]]:
    """Yield the shards in order, drawn by several processes, at most AHEAD shards per process before the encoder."""
    plain = _plain_shards(shards)
    tasks = [(options.world, options.seed, number, number >= plain, options.folder) for number in range(shards)]
    processes = options.threads or os.cpu_count() or 1
    if processes == 1:
        yield from map(_draw_shard, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        drawn: deque[Any] = deque()
        for task in tasks:
            drawn.append(pool.apply_async(_draw_shard, (task,)))
            if len(drawn) > AHEAD * processes:
                yield drawn.popleft().get(SHARD_TIMEOUT_S)
        while drawn:
            yield drawn.popleft().get(SHARD_TIMEOUT_S)


def _draw_shard(task: tuple[str, int, int, bool, Path]) -> dict[str, Any]:
    name, seed, number, is_edited, folder = task
    world = load_world(name, folder)
    sample = world.sample_edited if is_edited else world.sample
    rng = random.Random(f"{seed}/{number}")
    encoder = PromptEncoder(folder / "tokenizer")
    after, before, captions = [], [], []
    for _ in range(SHARD):
        composition = sample(rng)
        # The same variation of colours in both pictures, so that unedited parts are equal, as in a real edit.
        paint = rng.getrandbits(32)
        after.append(world.draw(composition, random.Random(paint)))
        if is_edited:
            before.append(world.draw(world.edit(composition, rng), random.Random(paint)))
        captions.append([encoder.encode(world.caption(composition, rng, complete=k == 0)) for k in range(CAPTIONS)])
    shard = {"after": np.stack(after), "captions": np.array(captions, np.int16)}
    return shard | ({"before": np.stack(before)} if is_edited else {})


if __name__ == "__main__":
    main()
