"""Train text encoder and UNet together to predict v on the encoded scenes, for generation and edits.

Two things differ from plain training. Half of each batch has timesteps at which the layout is decided. And some rows
start from the latents of another picture, in whole or inside a rectangle, while the target is still the captioned
scene: that is the input of the model in image to image and in inpainting by blending, and trains it to keep positions
and follow the prompt. Such rows have scenes of their own, whose captions tell less of positions.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.builtin_model.autoencoder import Autoencoder, pixels_from
from scripts.builtin_model.denoiser import TRAIN_TIMESTEPS, Denoiser, alphas_cumprod, sample_latents, schedule
from scripts.builtin_model.sheets import save_sheet
from scripts.builtin_model.tokenizer import PromptEncoder, build_vocabulary
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

HELD_OUT = 256  # scenes that are not trained on
LAYOUT_TIMESTEPS = (400, 1000)  # at these timesteps position and shape are decided
EDIT_TIMESTEPS = 300  # from this timestep on a row may start from another picture: strengths of 0.3 and more
FIRST_TIMESTEPS = (500, 800)  # edits at strengths of 0.6 to 0.9 begin here: half of the rows that are edits
WHOLE_SHARE = 0.85  # rows that start from another picture in whole; the others do so in a rectangle
NOISE_TIMESTEPS = 750  # from this timestep on, half of the other rows are noise alone, as where a picture begins
UNCAPTIONED_SHARE = 0.1  # rows without a caption, for classifier-free guidance


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="contains autoencoder.pt, tokenizer/ and scenes.pt")
    parser.add_argument("--world", choices=WORLD_NAMES, default="shapes", help="what is drawn (%(default)s)")
    parser.add_argument("--steps", type=int, default=40_000, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="rows per step (%(default)s)")
    parser.add_argument("--peak-learning-rate", type=float, default=1e-3, help="(%(default)s)")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[80, 128], help="channels of the UNet's levels (80 128)"
    )
    parser.add_argument(
        "--patch", type=int, default=2, choices=(1, 2), help="1 is better, but three times the work (%(default)s)"
    )
    parser.add_argument("--start-from", type=Path, help="checkpoint to start from, of the same shape")
    parser.add_argument(
        "--edit-share", type=float, default=0.6, help="share of rows that start from another picture (%(default)s)"
    )
    parser.add_argument("--report-every", type=int, default=1000, help="steps between reports (%(default)s)")
    parser.add_argument(
        "--until", type=float, default=math.inf, help="end at this time at the latest, in seconds since 1970 (never)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: the library's default")
    train(parser.parse_args())


class Scenes:
    """The encoded training set on the device, normalised.

    Attributes:
        plain: number of scenes before those that are made from another picture.
    """

    def __init__(self, path: Path, device: torch.device, mean: Tensor | None, scale: Tensor | None) -> None:
        content = load_checkpoint(path)
        self.plain = int(content["plain"])
        after = content["after"].float()
        self.mean = after.mean((0, 2, 3), keepdim=True) if mean is None else mean
        self.scale = after.std((0, 2, 3), keepdim=True) if scale is None else scale
        self.after = ((after - self.mean) / self.scale).to(device)
        self.before = ((content["before"].float() - self.mean) / self.scale).to(device)
        self.captions = content["captions"].to(device)

    def __len__(self) -> int:
        return len(self.after)


def train(options: argparse.Namespace) -> None:
    """Train to `options.steps`, from the last checkpoint in `options.folder` if any, and write denoiser.pt there."""
    device = choose_device(options.threads)
    torch.manual_seed(options.seed)
    initial = load_checkpoint(options.start_from) if options.start_from else None
    world = load_world(options.world, options.folder)
    if initial:
        settings = initial["settings"] | {"time_scale": world.sizes.time_scale}
        model = Denoiser.from_checkpoint(initial | {"settings": settings})
    else:
        vocabulary, _ = build_vocabulary(world.sizes.words)
        sizes = world.sizes
        model = Denoiser(
            len(vocabulary), options.channels, options.patch, sizes.latent_channels, sizes.window, sizes.time_scale
        )
    place(model, device)
    normalisation = (initial["mean"], initial["scale"]) if initial else (None, None)
    scenes = Scenes(options.folder / "scenes.pt", device, *normalisation)
    run = Run(world, model, scenes, options, device)
    path = options.folder / "denoiser.pt"
    start = run.resume(path) if path.exists() else 0
    progress = Progress("denoiser", options.steps, start)
    if start == 0:
        print(f"  held-out loss {run.held_out_loss():.4f}", flush=True)
    began, ends = time.time(), options.until
    for step in range(start, options.steps):
        # Where the time ends the training, the learning rate falls with the time, from where the last run ended.
        late = start + (options.steps - start) * (time.time() - began) / (ends - began)
        progress.advance(step + 1, run.step(step, max(step, late)))
        ended = step + 1 == options.steps or time.time() >= ends
        if (step + 1) % options.report_every == 0 or ended:
            run.average.swap()
            print(f"  held-out loss {run.held_out_loss():.4f}", flush=True)
            run.save_sheet(options.folder / f"denoiser_{step + 1:06}.png")
            run.average.swap()
            save_checkpoint(path, run.checkpoint(step + 1))
        if ended:
            break


class Run:
    """The state of a training: the model, the optimiser and the moving average."""

    def __init__(
        self, world: World, model: Denoiser, scenes: Scenes, options: argparse.Namespace, device: torch.device
    ) -> None:
        self.world = world
        self.model, self.scenes, self.options, self.device = model, scenes, options, device
        self.signal = alphas_cumprod(model.time_scale).to(device)
        self.parameters = list(model.parameters())
        self.optimiser = torch.optim.AdamW(
            self.parameters, options.peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.average = MovingAverage(self.parameters, 0.998)
        self.prompts = PromptEncoder(options.folder / "tokenizer")
        self.empty = torch.tensor(self.prompts.encode(""), device=device)
        self.predict = torch.compile(model) if device.type == "cuda" else model

    def step(self, step: int, done: float) -> Tensor:
        """Run one optimiser step. Its data depend only on the seed and the step, so a resumed run uses the same.

        Args:
            step: number of the step.
            done: how many steps of the training are finished, by their number or by the time.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.options.peak_learning_rate, done, self.options.steps)
        generator = torch.Generator(self.device).manual_seed(self.options.seed * 10_000_019 + step)
        loss = self._loss(generator).mean()
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.average.update()
        return loss

    def _loss(self, generator: torch.Generator) -> Tensor:
        rows, scenes, device = self.options.batch, self.scenes, self.device
        timesteps = self._timesteps(rows, generator)
        uncaptioned = torch.rand(rows, generator=generator, device=device) < UNCAPTIONED_SHARE
        # Rows without a caption too: guidance subtracts what they predict, which would otherwise be the old thing in
        # its place, and so would move the new one away from there.
        edited = (torch.rand(rows, generator=generator, device=device) < self.options.edit_share) & (
            timesteps >= EDIT_TIMESTEPS
        )
        timesteps = torch.where(edited, self._first_timesteps(timesteps, generator), timesteps)
        plain = torch.randint(HELD_OUT, scenes.plain, (rows,), generator=generator, device=device)
        others = torch.randint(scenes.plain, len(scenes), (rows,), generator=generator, device=device)
        index = torch.where(edited, others, plain)
        choice = torch.randint(0, scenes.captions.shape[1], (rows,), generator=generator, device=device)
        input_ids = scenes.captions[index, choice].long()
        input_ids = torch.where(uncaptioned[:, None], self.empty, input_ids)
        target = scenes.after[index]
        where = self._regions(rows, target.shape[-1], generator) & edited[:, None, None, None]
        start = torch.where(where, scenes.before[others - scenes.plain], target)
        from_noise = torch.rand(rows, generator=generator, device=device) < 0.5
        from_noise &= ~edited & (timesteps >= NOISE_TIMESTEPS)
        start = torch.where(from_noise[:, None, None, None], torch.zeros_like(start), start)
        return self._squared_error(start, target, timesteps, input_ids, generator)

    def _timesteps(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return timesteps: half of them evenly spread over all, half at random in LAYOUT_TIMESTEPS."""
        even = rows - rows // 2
        offset = torch.rand(1, generator=generator, device=self.device)
        spread = (offset + torch.arange(even, device=self.device) / even) % 1 * TRAIN_TIMESTEPS
        low, high = LAYOUT_TIMESTEPS
        layout = low + (high - low) * torch.rand(rows // 2, generator=generator, device=self.device)
        timesteps = torch.cat([layout, spread]).long()
        return timesteps.clamp(max=TRAIN_TIMESTEPS - 1)

    def _first_timesteps(self, timesteps: Tensor, generator: torch.Generator) -> Tensor:
        """Return timesteps of edits: those of the first half of the rows at random in FIRST_TIMESTEPS instead.

        The later steps of an edit see hardly more of the other picture than a picture from noise does.
        """
        low, high = FIRST_TIMESTEPS
        first = low + (high - low) * torch.rand(len(timesteps) // 2, generator=generator, device=self.device)
        return torch.cat([first.long(), timesteps[len(timesteps) // 2 :]])

    def _regions(self, rows: int, side: int, generator: torch.Generator) -> Tensor:
        """Return where rows start from another picture: WHOLE_SHARE everywhere, the others in a random rectangle.

        Returns:
            bool (rows, 1, side, side).
        """
        corners = torch.rand(rows, 2, 2, generator=generator, device=self.device).sort(dim=2).values * (side + 2) - 1
        positions = torch.arange(side, device=self.device)
        inside = (positions >= corners[..., :1]) & (positions <= corners[..., 1:])  # rows, axis, side
        whole = torch.rand(rows, generator=generator, device=self.device) < WHOLE_SHARE
        rectangle = inside[:, 0, :, None] & inside[:, 1, None, :]
        return (rectangle | whole[:, None, None])[:, None]

    def _squared_error(
        self, start: Tensor, target: Tensor, timesteps: Tensor, input_ids: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean squared error of v for each row, where v leads from the noised `start` to `target`.

        With start == target this is v = sqrt(a) noise - sqrt(1-a) target (Salimans and Ho 2022).
        """
        signal = self.signal[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn(start.shape, generator=generator, device=self.device)
        noised = signal.sqrt() * start + (1 - signal).sqrt() * noise
        v = (signal.sqrt() * noised - target) / (1 - signal).sqrt()
        with autocast(self.device):
            predicted = self.predict(noised, timesteps, input_ids)
        error: Tensor = (predicted.float() - v).square().mean((1, 2, 3))
        return error

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss on complete captions of the held-out scenes, always with the same noise."""
        count = min(HELD_OUT, len(self.scenes)) // 64 * 64
        generator = torch.Generator(self.device).manual_seed(5)
        losses = []
        for i in range(0, count, 64):
            target = self.scenes.after[i : i + 64]
            timesteps = torch.linspace(20, TRAIN_TIMESTEPS - 1, 64, device=self.device).long()
            input_ids = self.scenes.captions[i : i + 64, 0].long()
            losses.append(self._squared_error(target, target, timesteps, input_ids, generator).mean())
        return torch.stack(losses).mean().item()

    @torch.no_grad()
    def save_sheet(self, path: Path) -> None:
        """Draw the prompts of the world and write them as a contact sheet."""
        autoencoder = Autoencoder.from_checkpoint(load_checkpoint(self.options.folder / "autoencoder.pt"))
        input_ids = torch.tensor([self.prompts.encode(prompt) for prompt in self.world.prompts], device=self.device)
        noise = torch.randn(len(input_ids), *self.scenes.after.shape[1:], generator=torch.Generator().manual_seed(0))
        latents = sample_latents(self.model, input_ids, self.empty, noise.to(self.device)).cpu()
        pictures = pixels_from(autoencoder.decode(latents * self.scenes.scale + self.scenes.mean))
        save_sheet(path, [list(pictures[i : i + 8]) for i in range(0, len(pictures), 8)])

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Return a checkpoint: the averaged weights for the export, and the state for a resumed run."""
        self.average.swap()
        weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.average.swap()
        return {
            "step": step,
            "settings": self.model.settings,
            "schedule": schedule(self.model.time_scale),
            "weights": weights,
            "mean": self.scenes.mean,
            "scale": self.scenes.scale,
            "resume": {
                "weights": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": self.average.state(),
            },
        }

    def resume(self, path: Path) -> int:
        """Restore the state of a checkpoint, and return the number of finished steps.

        Raises:
            SystemExit: the checkpoint has another noise schedule.
        """
        content = load_checkpoint(path)
        if content["schedule"] != schedule(self.model.time_scale):
            raise SystemExit(
                f"{path} was trained with another noise schedule, {content['schedule']}; use another folder, with"
                f" --start-from {path}"
            )
        self.model.load_state_dict(content["resume"]["weights"])
        self.optimiser.load_state_dict(content["resume"]["optimiser"])
        self.average.restore(content["resume"]["average"])
        print(f"denoiser: resumed at step {content['step']}", flush=True)
        return int(content["step"])


if __name__ == "__main__":
    main()
