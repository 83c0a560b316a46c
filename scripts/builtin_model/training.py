"""What both trainings share: device, schedule, moving average, checkpoints, progress."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MovingAverage",
    "Progress",
    "autocast",
    "choose_device",
    "learning_rate",
    "load_checkpoint",
    "save_checkpoint",
]


def choose_device(threads: int = 0) -> torch.device:
    """The GPU if there is one, else the CPU with `threads` threads (0: as many as torch likes)."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to its device, with channels innermost: convolutions are faster so."""
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def autocast(device: torch.device, *, on_cpu: bool = False) -> AbstractContextManager[Any]:
    """bf16 on a GPU, and if wanted on a CPU that multiplies bf16 by itself.

    There the autoencoder's steps take a third less time with it, for its grids are large; the denoiser's take more.
    """
    enabled = device.type == "cuda" or (on_cpu and _multiplies_bf16())
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@cache
def _multiplies_bf16() -> bool:
    path = Path("/proc/cpuinfo")
    flags = path.read_text("utf-8") if path.exists() else ""
    return " avx512_bf16" in flags or " amx_bf16" in flags


def learning_rate(peak: float, step: int, steps: int, warm_up: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    falling = 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps))
    return peak * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * falling)


class MovingAverage:
    """An exponential moving average of a model's weights; young averages forget faster.

    Args:
        decay: towards which the average's memory grows, for each update.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def update(self) -> None:
        """Take in the present weights."""
        self.updates += 1
        decay = min(self.decay, self.updates / (10 + self.updates))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    def swap(self) -> None:
        """Exchange the model's weights with the average; a second call undoes it."""
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(mean)
            mean.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "average": self.average}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.updates = state["updates"]
        for mean, kept in zip(self.average, state["average"], strict=True):
            mean.copy_(kept)


class Progress:
    """Prints a line now and then: step, rate, time left, and the mean of the loss since the last line."""

    def __init__(self, name: str, steps: int, start: int = 0, every_s: float = 10.0) -> None:
        self.name, self.steps, self.every_s = name, steps, every_s
        self.first, self.begun = start, time.monotonic()
        self.printed = self.begun
        self.losses: list[Tensor] = []

    def advance(self, step: int, loss: Tensor) -> None:
        """Note that `step` steps are done. The loss stays on its device until it is printed."""
        self.losses.append(loss.detach())
        now = time.monotonic()
        if now - self.printed < self.every_s and step < self.steps:
            return
        mean = torch.stack(self.losses).mean().item()
        rate = (step - self.first) / (now - self.begun)
        filled = 24 * step // self.steps
        left_s = (self.steps - step) / rate
        print(
            f"{self.name} [{'#' * filled}{'.' * (24 - filled)}] {step}/{self.steps} loss {mean:.4f} "
            f"{rate:.2f} steps/s, {left_s / 60:.1f} min left",
            flush=True,
        )
        self.printed, self.losses = now, []


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    beside = path.with_suffix(".part")
    torch.save(content, beside)
    os.replace(beside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are unpickled."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content
