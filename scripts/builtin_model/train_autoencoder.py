"""Trains the autoencoder on scenes and textures drawn as it goes; can also train on with the encoder, and so all latents, fixed.

Loss: absolute and squared error, and the absolute error of the differences between neighbouring pixels, which is what makes
edges straight. The latents are disturbed a little before decoding, for the denoiser's latents will not be exact either.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scripts.builtin_model.autoencoder import LATENT_CHANNELS, VAE_SCALE_FACTOR, Autoencoder, pixels_from, tensor_from
from scripts.builtin_model.sample_scenes import sampled_scene
from scripts.builtin_model.scenes import PICTURE_PX, Composition, draw_composition, sample_composition
from scripts.builtin_model.sheets import save_sheet
from scripts.builtin_model.textures import sample_texture
from scripts.builtin_model.training import (
    MovingAverage,
    Progress,
    autocast,
    choose_device,
    learning_rate,
    load_checkpoint,
    place,
    save_checkpoint,
)
from tests.reader import read_picture

LATENT_SIDES = (PICTURE_PX // VAE_SCALE_FACTOR,) * 2
LATENT_NOISE_MAX = 0.15  # standard deviation; each picture gets its own, for a sampled latent is not exact either
# Small figures are what a round trip loses first: they get more than their share here.
KINDS = {"one": 0.4, "two": 0.15, "three": 0.25, "pair": 0.2}
HELD_OUT_SEED = 1_000_003


def main() -> None:
    """Parse the command line, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints and contact sheets go")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--textures", type=float, default=0.25, help="share of pictures that are no scenes (0..1)")
    parser.add_argument("--start-from", type=Path, help="checkpoint whose weights to start from, where shapes agree")
    parser.add_argument("--sampled", type=Path, help="sampled.pt: latents that a denoiser made, to be decoded as meant")
    parser.add_argument("--name", default="autoencoder", help="of the checkpoint and the contact sheets in the folder")
    parser.add_argument("--fix-encoder", action="store_true", help="train the decoder alone: a denoiser stays valid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """Run from the last checkpoint in `options.folder`, or from the start, to `options.steps`; leaves autoencoder.pt there."""
    device = choose_device(options.threads)
    torch.manual_seed(options.seed)
    model = Autoencoder()
    if options.start_from:
        print("weights taken over:", take_over(model, load_checkpoint(options.start_from)))
    place(model, device)
    trained = list((model.decoder if options.fix_encoder else model).parameters())
    optimiser = torch.optim.AdamW(trained, options.peak_learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    average = MovingAverage(model.parameters(), 0.998)
    sampled = load_checkpoint(options.sampled) if options.sampled else None
    path = options.folder / f"{options.name}.pt"
    options.folder.mkdir(parents=True, exist_ok=True)
    start = _resume(path, model, optimiser, average) if path.exists() else 0
    loss_of = torch.compile(_loss) if device.type == "cuda" else _loss
    progress = Progress("autoencoder", options.steps, start)
    for step in range(start, options.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(options.peak_learning_rate, step, options.steps)
        images, given = (part.to(device) for part in _batch(options, step, sampled))
        torch.manual_seed(_step_seed(options.seed, step))  # for the noise on the latents
        with autocast(device, on_cpu=True):
            loss = loss_of(model, images, given)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        progress.advance(step + 1, loss)
        if (step + 1) % 500 == 0 or step + 1 == options.steps:
            _report(model, average, device, options.folder / f"{options.name}_{step + 1:06}.png")
            save_checkpoint(path, _checkpoint(step + 1, model, optimiser, average))


def take_over(model: Autoencoder, checkpoint: dict[str, Any]) -> str:
    """Copy every weight whose name and shape agree; says how many of how many."""
    own = model.state_dict()
    fitting = {
        name: weight
        for name, weight in checkpoint["weights"].items()
        if name in own and own[name].shape == weight.shape
    }
    model.load_state_dict({**own, **fitting})
    return f"{len(fitting)} of {len(own)}"


def _loss(model: Autoencoder, images: Tensor, given: Tensor) -> Tensor:
    latents = torch.cat([given, model.encode(images[len(given) :]).float()])
    level = LATENT_NOISE_MAX * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    decoded = model.decode(latents + level * torch.randn_like(latents)).float()
    difference = decoded - images
    across, down = difference.diff(dim=3), difference.diff(dim=2)
    edges = across.abs().mean() + down.abs().mean()
    # The last term keeps the latents' scale near one; they are normalised exactly at the export.
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges + 2e-3 * latents.square().mean()


def _step_seed(seed: int, step: int) -> int:
    """All chance in a step follows from this, so that a resumed run goes on as if it had never stopped."""
    return seed * 10_000_019 + step


def _batch(options: argparse.Namespace, step: int, sampled: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Pictures, whole ones: the decoder has to see an object to know how its outline goes on; and latents for the first of them.

    Those are what the denoiser made, half of the batch; the other pictures are freshly drawn, and encoded as they are.
    """
    rng = random.Random(_step_seed(options.seed, step))
    picks = rng.choices(range(len(sampled["numbers"])), k=options.batch // 2) if sampled else []
    pictures = [sampled_scene(sampled["seed"], int(sampled["numbers"][pick]))[1] for pick in picks] if sampled else []
    given = sampled["latents"][picks].float() if sampled else torch.empty(0, LATENT_CHANNELS, *LATENT_SIDES)
    while len(pictures) < options.batch:
        textured = rng.random() < options.textures
        picture = sample_texture(rng) if textured else draw_composition(_composition(rng), rng)
        pictures.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
    return tensor_from(np.stack(pictures)).contiguous(memory_format=torch.channels_last), given


def _composition(rng: random.Random) -> Composition:
    return sample_composition(rng, rng.choices(list(KINDS), list(KINDS.values()))[0])


@torch.no_grad()
def round_trips(model: Autoencoder, pictures: npt.NDArray[np.uint8], device: torch.device) -> npt.NDArray[np.uint8]:
    """Encode and decode uint8 (N, H, W, 3), a few at a time."""
    parts = [pictures[i : i + 50] for i in range(0, len(pictures), 50)]
    return np.concatenate([pixels_from(model.decode(model.encode(tensor_from(part).to(device)))) for part in parts])


def read_round_trips(model: Autoencoder, device: torch.device, count: int = 300) -> tuple[dict[str, float], Any]:
    """How much of held-out scenes the reader still sees after a round trip, and some pictures before and after.

    Returns:
        the parts (0..1) of scenes with the right background and count, and of objects in rightly counted scenes with the right
        colour and shape, the mean similarity to the shape, and `psnr` in dB; then two rows of pictures.
    """
    rng = random.Random(HELD_OUT_SEED)
    compositions = [sample_composition(rng) for _ in range(count)]
    pictures = np.stack([draw_composition(composition, rng) for composition in compositions])
    decoded = round_trips(model, pictures, device)
    right = dict.fromkeys(("background", "count", "colour", "shape", "similarity"), 0.0)
    objects = 0
    for composition, before, after in zip(compositions, pictures, decoded, strict=True):
        truth, seen = read_picture(before), read_picture(after)
        right["background"] += seen.background == composition.background
        if len(seen.objects) != len(truth.objects):
            continue
        right["count"] += 1
        for was, now in zip(truth.objects, seen.objects, strict=True):
            objects += 1
            right["colour"] += now.colour == was.colour
            right["shape"] += now.shape == was.shape
            right["similarity"] += now.similarity
    figures = {
        name: value / (count if name in ("background", "count") else max(1, objects)) for name, value in right.items()
    }
    figures["psnr"] = 10 * float(np.log10(255**2 / ((decoded.astype(float) - pictures) ** 2).mean()))
    return figures, [list(pictures[:12]), list(decoded[:12])]


def _report(model: Autoencoder, average: MovingAverage, device: torch.device, sheet: Path) -> None:
    average.swap()
    figures, rows = read_round_trips(model, device)
    rng = random.Random(HELD_OUT_SEED)
    textures = np.stack([sample_texture(rng) for _ in range(12)])
    save_sheet(sheet, [*rows, list(textures), list(round_trips(model, textures, device))])
    average.swap()
    print("  round trips as read:", {name: round(value, 3) for name, value in figures.items()}, flush=True)


def _checkpoint(
    step: int, model: Autoencoder, optimiser: torch.optim.Optimizer, average: MovingAverage
) -> dict[str, Any]:
    average.swap()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    average.swap()
    return {
        "step": step,
        "settings": model.settings,
        "weights": weights,  # the average: what is exported
        "resume": {
            "weights": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": average.state(),
        },
    }


def _resume(path: Path, model: Autoencoder, optimiser: torch.optim.Optimizer, average: MovingAverage) -> int:
    checkpoint = load_checkpoint(path)
    model.load_state_dict(checkpoint["resume"]["weights"])
    optimiser.load_state_dict(checkpoint["resume"]["optimiser"])
    average.restore(checkpoint["resume"]["average"])
    print(f"autoencoder: going on at step {checkpoint['step']}", flush=True)
    return int(checkpoint["step"])


if __name__ == "__main__":
    main()
