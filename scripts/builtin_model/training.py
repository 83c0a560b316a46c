"""Shared by both trainings: device, learning rate, moving average, checkpoints, progress."""

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
    """Return the GPU if there is one, else the CPU with `threads` threads (0: torch's default)."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to its device, with channels innermost, which makes convolutions faster."""
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def autocast(device: torch.device, *, on_cpu: bool = False) -> AbstractContextManager[Any]:
    """Return a context that uses bf16 on a GPU, and with `on_cpu` also on a CPU with bf16 instructions.

    On a CPU with bf16, steps of the autoencoder take a third less time, because its grids are large; steps of the
    denoiser take more time.
    """
    enabled = device.type == "cuda" or (on_cpu and _has_bf16())
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@cache
def _has_bf16() -> bool:
    path = Path("/proc/cpuinfo")
    flags = path.read_text("utf-8") if path.exists() else ""
    return " avx512_bf16" in flags or " amx_bf16" in flags


def learning_rate(peak: float, step: float, steps: int, warm_up: int = 100) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to a fiftieth of the peak."""
    falling = 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps))
    return peak * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * falling)


class MovingAverage:
    """An exponential moving average of a model's weights. The decay is smaller for the first updates.

    Args:
        parameters: the weights.
        decay: final decay per update.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def update(self) -> None:
        """Update the average with the current weights."""
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
        """Return the state for a checkpoint."""
        return {"updates": self.updates, "average": self.average}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.updates = state["updates"]
        for mean, kept in zip(self.average, state["average"], strict=True):
            mean.copy_(kept)


class Progress:
    """Prints a line every `every_s` seconds: step, mean loss since the last line, rate and time left."""

    def __init__(self, name: str, steps: int, start: int = 0, every_s: float = 10.0) -> None:
        self.name, self.steps, self.every_s = name, steps, every_s
        self.first, self.began = start, time.monotonic()
        self.printed = self.began
        self.losses: list[Tensor] = []

    def advance(self, step: int, loss: Tensor) -> None:
        """Record that `step` steps are finished. The loss stays on its device until it is printed."""
        self.losses.append(loss.detach())
        now = time.monotonic()
        if now - self.printed < self.every_s and step < self.steps:
            return
        mean = torch.stack(self.losses).mean().item()
        rate = (step - self.first) / (now - self.began)
        filled = 24 * step // self.steps
        left_s = (self.steps - step) / rate
        print(
            f"{self.name} [{'#' * filled}{'.' * (24 - filled)}] {step}/{self.steps} loss {mean:.4f} "
            f"{rate:.2f} steps/s, {left_s / 60:.1f} min left",
            flush=True,
        )
        self.printed, self.losses = now, []


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: the file is complete or unchanged."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. Only tensors and plain values are unpickled."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content
