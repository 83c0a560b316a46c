"""The interface of a plan: the steps of one picture as pure array functions.

A plan holds no state between steps. What a scheduler carries from step to step (earlier predictions) travels through
`history`, and noise that a step adds is passed in. So the steps of several plans can be interleaved in any order, and
a step can be repeated. Arrays are float32 (1, C, H/8, W/8).
"""

# ruff: noqa: ARG002 (the methods of all plans have the same signature; the base class uses few of the parameters)

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ovserve.engines.schedulers.noise import Array, SchedulerConfig, f32

__all__ = ["DiffusionPlan", "History", "Plan", "StepResult", "divide", "root"]

History = tuple[Array, ...]


def root(value: np.float32) -> np.float32:
    """Return the square root, rounded to float32."""
    return f32(np.sqrt(value))


def divide(array: Array, by: np.float32) -> Array:
    """Return `array / by`, computed in float32."""
    quotient: Array = np.divide(array, by, dtype=f32)
    return quotient


@dataclass(frozen=True, slots=True)
class StepResult:
    """The arrays that one step returns.

    Attributes:
        latents: the latents at the next noise level: input of the next UNet call.
        clean: the predicted clean latents, x0: what a preview shows.
        history: argument for the next step.
        decoded: what the VAE decoder gets if this step was the last; None: the latents.
    """

    latents: Array
    clean: Array
    history: History = ()
    decoded: Array | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one picture. Immutable; `index` counts the steps that are run, from 0.

    Attributes:
        timesteps: the training timestep of each denoiser call, falling; flow matching has fractions.
        count: steps of the whole schedule.
        start: how many steps of the whole schedule are skipped because of strength.
        init_sigma: scale of pure noise at the first timestep.
    """

    timesteps: tuple[float, ...]
    count: int
    start: int
    init_sigma: np.float32

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return the latents, scaled as the denoiser was trained to see them at this step."""
        return latents

    def draws_noise(self, index: int) -> bool:
        """Return whether `step` at `index` needs fresh standard normal noise."""
        return False

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Bring clean latents to the noise level of step `index`."""
        raise NotImplementedError

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Move the latents from the noise level of step `index` to the next one.

        Args:
            prediction: the denoiser's output at `timesteps[index]`, after guidance.
            latents: not scaled by `scale_input`.
            index: number of the step.
            history: that of the step before; empty at the first step.
            noise: standard normal, where `draws_noise(index)`; else None.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DiffusionPlan(Plan):
    """A plan of a model with a table of alphas: DDPM's forward process, arXiv:2006.11239."""

    timesteps: tuple[int, ...]
    config: SchedulerConfig
    alphas: Array

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Bring clean latents to the noise level of step `index`: arXiv:2006.11239, equation 4."""
        alpha = self.alphas[self.timesteps[index]]
        noised: Array = root(alpha) * clean + f32(math.sqrt(1.0 - float(alpha))) * noise
        return noised

    def _clean_and_noise(self, prediction: Array, latents: Array, alpha: np.float32) -> tuple[Array, Array]:
        """Return x0 and epsilon of a prediction: arXiv:2010.02502, equation 12; for v: arXiv:2202.00512, appendix D."""
        signal, rest = root(alpha), root(f32(1) - alpha)
        if self.config.prediction_type == "epsilon":
            return divide(latents - rest * prediction, signal), prediction
        return signal * latents - rest * prediction, signal * prediction + rest * latents
