"""Train the autoencoder on scenes and textures that are drawn during the training, or only its decoder (--fix-encoder).

Loss: absolute and squared error, and the absolute error of the differences between neighbouring pixels, which makes
edges straight. A little noise is added to the latents before decoding, because the denoiser's latents are not exact
either.
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

from scripts.builtin_model.autoencoder import VAE_SCALE_FACTOR, Autoencoder, pixels_from, tensor_from
from scripts.builtin_model.sample_scenes import sampled_scene
from scripts.builtin_model.scenes import PICTURE_PX
from scripts.builtin_model.sheets import save_sheet
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
from scripts.builtin_model.worlds import WORLD_NAMES, World, load_world

LATENT_SIDES = (PICTURE_PX // VAE_SCALE_FACTOR,) * 2
HELD_OUT_SEED = 1_000_003


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for checkpoints and contact sheets")
    parser.add_argument("--world", choices=WORLD_NAMES, default="shapes", help="what is drawn (%(default)s)")
    parser.add_argument("--steps", type=int, default=12_000, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures per step (%(default)s)")
    parser.add_argument("--peak-learning-rate", type=float, default=1.5e-3, help="(%(default)s)")
    parser.add_argument(
        "--textures", type=float, default=0.25, help="share of textures in the pictures, 0..1 (%(default)s)"
    )
    parser.add_argument("--start-from", type=Path, help="checkpoint to start from; weights of other shapes are ignored")
    parser.add_argument("--sampled", type=Path, help="sampled.pt: latents from a denoiser, with the correct pictures")
    parser.add_argument("--name", default="autoencoder", help="name of checkpoint and contact sheets (%(default)s)")
    parser.add_argument("--fix-encoder", action="store_true", help="train only the decoder; a denoiser stays valid")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: the library's default")
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """Train to `options.steps`, from the last checkpoint in `options.folder` if any; write `options.name`.pt."""
    device = choose_device(options.threads)
    torch.manual_seed(options.seed)
    world = load_world(options.world, options.folder)
    model = Autoencoder(latent_channels=world.sizes.latent_channels)
    if options.start_from:
        print("weights copied:", copy_matching_weights(model, load_checkpoint(options.start_from)))
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
        images, given = (part.to(device) for part in _batch(world, options, step, sampled))
        torch.manual_seed(_step_seed(options.seed, step))  # for the noise on the latents
        with autocast(device, on_cpu=True):
            loss = loss_of(model, images, given, world.latent_noise)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        progress.advance(step + 1, loss)
        if (step + 1) % 500 == 0 or step + 1 == options.steps:
            _report(world, model, average, device, options.folder / f"{options.name}_{step + 1:06}.png")
            save_checkpoint(path, _checkpoint(step + 1, model, optimiser, average))


def copy_matching_weights(model: Autoencoder, checkpoint: dict[str, Any]) -> str:
    """Copy every weight with the same name and shape; return their number as "M of N"."""
    own = model.state_dict()
    matching = {
        name: weight
        for name, weight in checkpoint["weights"].items()
        if name in own and own[name].shape == weight.shape
    }
    model.load_state_dict({**own, **matching})
    return f"{len(matching)} of {len(own)}"


def _loss(model: Autoencoder, images: Tensor, given: Tensor, noise: float) -> Tensor:
    latents = torch.cat([given, model.encode(images[len(given) :]).float()])
    level = noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    decoded = model.decode(latents + level * torch.randn_like(latents)).float()
    difference = decoded - images
    across, down = difference.diff(dim=3), difference.diff(dim=2)
    edges = across.abs().mean() + down.abs().mean()
    # The last term keeps the scale of the latents near one; the export normalises them exactly.
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges + 2e-3 * latents.square().mean()


def _step_seed(seed: int, step: int) -> int:
    """Return the seed of everything random in a step, so that a resumed run equals an uninterrupted one."""
    return seed * 10_000_019 + step


def _batch(
    world: World, options: argparse.Namespace, step: int, sampled: dict[str, Any] | None
) -> tuple[Tensor, Tensor]:
    """Return pictures, and given latents for the first of them.

    The given latents are the denoiser's, for half of the batch if there are any; the other pictures are new and will be
    encoded. Pictures are whole, not crops, because the decoder needs a whole object to continue its outline.
    """
    rng = random.Random(_step_seed(options.seed, step))
    picks = rng.choices(range(len(sampled["numbers"])), k=options.batch // 2) if sampled else []
    pictures, given = [], torch.empty(0, world.sizes.latent_channels, *LATENT_SIDES)
    if sampled:
        numbers = [int(sampled["numbers"][pick]) for pick in picks]
        pictures = [sampled_scene(world, sampled["seed"], number)[1] for number in numbers]
        given = sampled["latents"][picks].float()
    while len(pictures) < options.batch:
        textured = rng.random() < options.textures
        picture = world.sample_texture(rng) if textured else world.sample_picture(rng)
        pictures.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
    return tensor_from(np.stack(pictures)).contiguous(memory_format=torch.channels_last), given


@torch.no_grad()
def round_trips(model: Autoencoder, pictures: npt.NDArray[np.uint8], device: torch.device) -> npt.NDArray[np.uint8]:
    """Encode and decode uint8 (N, H, W, 3), 50 pictures at a time."""
    parts = [pictures[i : i + 50] for i in range(0, len(pictures), 50)]
    return np.concatenate([pixels_from(model.decode(model.encode(tensor_from(part).to(device)))) for part in parts])


def read_round_trips(
    world: World, model: Autoencoder, device: torch.device, count: int = 300
) -> tuple[dict[str, float], Any]:
    """Measure what is left of held-out scenes after a round trip.

    Returns:
        The figures of the world's reader with `psnr` in dB, and two rows of pictures, before and after.
    """
    rng = random.Random(HELD_OUT_SEED)
    compositions = [world.sample(rng) for _ in range(count)]
    pictures = np.stack([world.draw(composition, rng) for composition in compositions])
    decoded = round_trips(model, pictures, device)
    figures = world.read_round_trips(compositions, pictures, decoded)
    figures["psnr"] = 10 * float(np.log10(255**2 / ((decoded.astype(float) - pictures) ** 2).mean()))
    return figures, [list(pictures[:12]), list(decoded[:12])]


def _report(world: World, model: Autoencoder, average: MovingAverage, device: torch.device, sheet: Path) -> None:
    average.swap()
    figures, rows = read_round_trips(world, model, device)
    rng = random.Random(HELD_OUT_SEED)
    textures = np.stack([world.sample_texture(rng) for _ in range(12)])
    save_sheet(sheet, [*rows, list(textures), list(round_trips(model, textures, device))])
    average.swap()
    print("  round trips:", {name: round(value, 3) for name, value in figures.items()}, flush=True)


def _checkpoint(
    step: int, model: Autoencoder, optimiser: torch.optim.Optimizer, average: MovingAverage
) -> dict[str, Any]:
    average.swap()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    average.swap()
    return {
        "step": step,
        "settings": model.settings,
        "weights": weights,  # the moving average, which is exported
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
    print(f"autoencoder: resumed at step {checkpoint['step']}", flush=True)
    return int(checkpoint["step"])


if __name__ == "__main__":
    main()
