"""Multistep solvers that OpenVINO GenAI lacks: DPM-Solver++(2M) and UniPC. They agree with diffusers within rounding.

Invariant: coefficients are computed in double and rounded to float32 before they multiply arrays.
"""

# ruff: noqa: ARG002 (the methods of all plans have the same signature; solvers draw no noise)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import DiffusionPlan, History, StepResult, divide

__all__ = ["DpmPlan", "SolverPlan", "UnipcPlan"]

SHORT_SCHEDULE = 15  # steps; a shorter schedule always ends with a step of order 1 in diffusers (lower_order_final)


@dataclass(frozen=True, slots=True)
class SolverPlan(DiffusionPlan):
    """An exponential integrator of the probability-flow ODE in the half log-SNR lambda = log(alpha / sigma).

    arXiv:2211.01095, section 3.1. At noise level s of the variance-exploding view, alpha = 1 / sqrt(s^2 + 1) and
    sigma = s alpha, so lambda = -log(s). Where the final level is zero, the last step is of order 1 and lands on x0,
    where lambda is infinite.
    """

    sigmas: np.ndarray[Any, np.dtype[np.float64]]  # noise levels of the whole schedule, then the final one

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Bring clean latents to the noise level of step `index`; a Karras level lies between two timesteps."""
        alpha, sigma = self._scales(index)
        return f32(alpha) * clean + f32(sigma) * noise

    def _scales(self, index: int) -> tuple[float, float]:
        level = float(self.sigmas[self.start + index])
        alpha = 1.0 / math.sqrt(level * level + 1.0)
        return alpha, level * alpha

    def _lambda(self, index: int) -> float:
        level = float(self.sigmas[self.start + index])
        return math.inf if level == 0.0 else -math.log(level)

    def _predicted_clean(self, prediction: Array, latents: Array, index: int) -> Array:
        alpha, sigma = (f32(scale) for scale in self._scales(index))
        if self.config.prediction_type == "epsilon":
            return divide(latents - sigma * prediction, alpha)
        return alpha * latents - sigma * prediction

    def _is_last(self, index: int) -> bool:
        return index == len(self.timesteps) - 1

    def _is_level_repeated(self, index: int) -> bool:
        """Return whether this step or the one before leads to the same noise level, so that there is no slope."""
        before, here, after = self.sigmas[self.start + index - 1 : self.start + index + 2]
        return bool(here in (before, after))

    def _transfer(self, latents: Array, clean: Array, index: int) -> tuple[Array, float]:
        """Return the step of order 1 from `index` to the next level, and the factor of the terms of higher order."""
        _, sigma = self._scales(index)
        alpha_next, sigma_next = self._scales(index + 1)
        factor = -alpha_next * math.expm1(self._lambda(index) - self._lambda(index + 1))
        return f32(sigma_next / sigma) * latents + f32(factor) * clean, factor


@dataclass(frozen=True, slots=True)
class DpmPlan(SolverPlan):
    """DPM-Solver++(2M): arXiv:2211.01095, algorithm 2. History: the clean latents predicted one step before."""

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Run one round of algorithm 2: order 2 uses the slope of x0 over lambda; the first step is of order 1."""
        clean = self._predicted_clean(prediction, latents, index)
        found, factor = self._transfer(latents, clean, index)
        if history and not self._is_order_1(index):
            here = self._lambda(index)
            ratio = (here - self._lambda(index - 1)) / (self._lambda(index + 1) - here)
            found = found + f32(factor * 0.5 / ratio) * (clean - history[0])
        return StepResult(found, clean, (clean,))

    def _is_order_1(self, index: int) -> bool:
        """Return whether a step after the first is of order 1."""
        is_final = self._is_last(index) and (not self.config.final_sigma_min or self.count < SHORT_SCHEDULE)
        return is_final or self._is_level_repeated(index)


@dataclass(frozen=True, slots=True)
class UnipcPlan(SolverPlan):
    """UniPC-2, data prediction: arXiv:2302.04867, algorithms 5 and 6, and table 1's B2(h) = exp(h) - 1.

    Each step first corrects its input latents, now that their prediction is known, then predicts the next latents.
    History: the corrected latents of the step before, its predicted clean latents, and the clean latents of the step
    before that.
    """

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Correct the input by algorithm 5 (UniC), then step by algorithm 6 (UniP); order 1 first and last, else 2."""
        clean = self._predicted_clean(prediction, latents, index)
        if history:
            latents = self._corrected(clean, index, history)
        found, factor = self._transfer(latents, clean, index)
        if self._order(index) == 2:
            ratio = self._ratio(index)
            found = found + f32(factor * 0.5 / ratio) * (history[1] - clean)
        return StepResult(found, clean, (latents, clean, *history[1:2]))

    def _order(self, index: int) -> int:
        return 1 if index == 0 or self._is_last(index) or self._is_level_repeated(index) else 2

    def _ratio(self, index: int) -> float:
        """Return (lambda of the step before - lambda here) / (lambda of the next step - lambda here): negative."""
        here = self._lambda(index)
        return (self._lambda(index - 1) - here) / (self._lambda(index + 1) - here)

    def _corrected(self, clean: Array, index: int, history: History) -> Array:
        """Compute the latents of `index` anew, with the prediction made from them: algorithm 5 (UniC)."""
        before, older = index - 1, history[1]
        found, factor = self._transfer(history[0], older, before)
        h = self._lambda(index) - self._lambda(before)
        if h == 0.0:  # a step to the same noise level: its latents need no correction
            return found
        scale = math.expm1(-h)
        first = scale / -h - 1.0
        if self._order(before) == 1:
            found += f32(factor * 0.5) * (clean - older)
            return found
        ratio = self._ratio(before)
        right = (first / scale, 2.0 * (first / -h - 0.5) / scale)
        weights = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array(right))
        slope = divide(history[2] - older, f32(ratio))
        found += f32(factor * weights[0]) * slope + f32(factor * weights[1]) * (clean - older)
        return found
