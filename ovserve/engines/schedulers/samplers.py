"""The schedulers that OpenVINO GenAI has: DDIM, PNDM, Euler, Euler ancestral and LCM.

They compute what OpenVINO GenAI 2026.4 computes, to the last bit: float32, its order of operations, double where it
uses double. tests/e2e/test_stepwise_equality.py compares the pictures.
"""

# ruff: noqa: ARG002 (the methods of all plans have the same signature; most schedulers ignore some of the parameters)

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ovserve.engines.schedulers.noise import Array, SchedulerConfig, f32
from ovserve.engines.schedulers.plans import DiffusionPlan, History, StepResult, divide, root

__all__ = ["DdimPlan", "EulerAncestralPlan", "EulerPlan", "LcmPlan", "PndmPlan"]


@dataclass(frozen=True, slots=True)
class DdimPlan(DiffusionPlan):
    """DDIM: arXiv:2010.02502, equation 12, eta = 0."""

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Mix the predicted x0 and noise anew, at the noise level of the timestep one stride before: equation 12."""
        t = self.timesteps[index]
        before = t - self.config.num_train_timesteps // self.count
        clean, epsilon = self._clean_and_noise(prediction, latents, self.alphas[t])
        if self.config.clip_sample:
            bound = f32(self.config.clip_sample_range)
            clean = np.clip(clean, -bound, bound)
        alpha = self.alphas[before] if before >= 0 else _final_alpha(self.config, self.alphas)
        found = root(alpha) * clean + root(f32(1) - alpha) * epsilon
        return StepResult(found, clean)


@dataclass(frozen=True, slots=True)
class PndmPlan(DiffusionPlan):
    """PNDM: arXiv:2202.09778, equation 11 (the transfer) on predictions mixed by table 6's linear multistep weights.

    The second timestep comes twice: step 1 repeats step 0 with the mean of both predictions. History: the last
    predictions as the UNet made them, oldest first; between steps 0 and 1 also the latents that step 0 started from.
    """

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Apply equation 11 from the timestep to the one a stride before, to the predictions mixed by equation 12."""
        stride = self.config.num_train_timesteps // self.count
        t = self.timesteps[index]
        before = t - stride
        if index == 1:
            (first, latents), before, t = history, t, t + stride
            kept: History = (first,)
            blended = (prediction + first) / f32(2)
        else:
            kept = (*history, prediction)[-4:]
            blended = _mix_predictions(kept)
        found, clean = self._transfer(blended, latents, min(t, self.config.num_train_timesteps - 1), before)
        return StepResult(found, clean, (*kept, latents) if index == 0 else kept)

    def _transfer(self, output: Array, latents: Array, t: int, before: int) -> tuple[Array, Array]:
        alpha = self.alphas[t]
        alpha_before = self.alphas[before] if before >= 0 else _final_alpha(self.config, self.alphas)
        rest, rest_before = f32(1) - alpha, f32(1) - alpha_before
        weight = root(f32(alpha_before / alpha))
        divisor = alpha * root(rest_before) + root(f32(f32(alpha * rest) * alpha_before))
        clean, _ = self._clean_and_noise(output, latents, alpha)
        if self.config.prediction_type == "v_prediction":
            output = root(alpha) * output + root(rest) * latents
        return weight * latents - (alpha_before - alpha) * output / divisor, clean


@dataclass(frozen=True, slots=True)
class EulerPlan(DiffusionPlan):
    """Euler: arXiv:2206.00364, algorithm 1 without its second-order part: x + (x - x0) / sigma * (sigma' - sigma)."""

    sigmas: Array  # of the whole schedule, then the final one

    def scale_input(self, latents: Array, index: int) -> Array:
        """Divide by sqrt(sigma^2 + 1), in double as the library does: arXiv:2206.00364, table 1, c_in."""
        sigma = float(self.sigmas[self.start + index])
        return (latents.astype(np.float64) / math.sqrt(sigma * sigma + 1.0)).astype(f32)

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Add noise of this step's sigma to unscaled latents (variance exploding): arXiv:2206.00364, section 2."""
        noised: Array = clean + self.sigmas[self.start + index] * noise
        return noised

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Follow the derivative (x - x0) / sigma from this noise level to the next. The library decodes x0."""
        sigma, after = self.sigmas[self.start + index], self.sigmas[self.start + index + 1]
        clean = self._clean(prediction, latents, sigma)
        found = ((latents - clean) / sigma) * f32(after - sigma) + latents
        return StepResult(found, clean, decoded=clean)

    def _clean(self, prediction: Array, latents: Array, sigma: np.float32) -> Array:
        if self.config.prediction_type == "epsilon":
            return latents - prediction * sigma
        square = float(sigma) * float(sigma) + 1.0
        rest = prediction.astype(np.float64) * (-float(sigma) / math.sqrt(square))
        return (rest + latents.astype(np.float64) / square).astype(f32)


@dataclass(frozen=True, slots=True)
class EulerAncestralPlan(EulerPlan):
    """Euler ancestral: a step down to sigma_down, then fresh noise of sigma_up; together they give the next sigma.

    sigma_up is that of ancestral sampling in the variance-exploding view: Song et al. 2021, arXiv:2011.13456,
    appendix F.
    """

    def draws_noise(self, index: int) -> bool:
        """Return True: the library draws at the last step too, and later draws depend on it."""
        return True

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Follow the derivative down to sigma_down, then add sigma_up times `noise`.

        Raises:
            ValueError: `noise` is None.
        """
        if noise is None:
            raise ValueError("noise is None; a step of euler_ancestral needs it")
        sigma, after = self.sigmas[self.start + index], self.sigmas[self.start + index + 1]
        clean = self._clean(prediction, latents, sigma)
        here, there = float(sigma) ** 2, float(after) ** 2
        up = f32(math.sqrt(there * (here - there) / here))
        down = f32(math.sqrt(there - float(up) ** 2))
        derivative = (latents - clean) / sigma
        found = (latents + derivative * f32(down - sigma)) + noise * up
        return StepResult(found, clean, decoded=clean)


@dataclass(frozen=True, slots=True)
class LcmPlan(DiffusionPlan):
    """LCM: arXiv:2310.04378, algorithm 3 (multistep consistency sampling).

    The boundary conditions c_skip and c_out are those of arXiv:2303.01469, appendix C.
    """

    def draws_noise(self, index: int) -> bool:
        """Return True for every step but the last."""
        return index != self.count - 1

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Bring clean latents to the noise level of step `index`: as the base class, but both roots in float32."""
        alpha = self.alphas[self.timesteps[index]]
        return root(alpha) * clean + root(f32(1) - alpha) * noise

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Run one round of algorithm 3: the consistency function c_skip x + c_out x0(x), then fresh noise.

        Raises:
            ValueError: `noise` is None before the last step.
        """
        t = self.timesteps[index]
        clean, _ = self._clean_and_noise(prediction, latents, self.alphas[t])
        if self.config.clip_sample:
            bound = f32(self.config.clip_sample_range)
            clean = np.clip(clean, -bound, bound)
        scaled = float(f32(f32(t) * f32(self.config.timestep_scaling)))
        spread = scaled * scaled + 0.25  # sigma_data = 0.5
        skip, out = f32(0.25 / spread), f32(scaled / math.sqrt(spread))
        denoised = out * clean + skip * latents
        if not self.draws_noise(index):
            return StepResult(denoised, clean, decoded=denoised)
        if noise is None:
            raise ValueError("noise is None; a step of lcm before the last needs it")
        alpha = self.alphas[self.timesteps[index + 1]]
        found = root(alpha) * denoised + root(f32(1) - alpha) * noise
        return StepResult(found, clean, decoded=denoised)


def _final_alpha(config: SchedulerConfig, alphas: Array) -> np.float32:
    """Return the abar that counts as the one before timestep 0."""
    return f32(1) if config.set_alpha_to_one else alphas[0]


def _mix_predictions(predictions: History) -> Array:
    """Mix 1 to 4 predictions, newest last, by Adams-Bashforth weights of that order: arXiv:2202.09778, equation 12."""
    if len(predictions) == 1:
        return predictions[0]
    if len(predictions) == 2:
        return divide(f32(3) * predictions[1] - predictions[0], f32(2))
    if len(predictions) == 3:
        return divide(f32(23) * predictions[2] - f32(16) * predictions[1] + f32(5) * predictions[0], f32(12))
    mixed: Array = (
        f32(55) * predictions[3] - f32(59) * predictions[2] + f32(37) * predictions[1] - f32(9) * predictions[0]
    )
    mixed *= f32(f32(1) / f32(24))
    return mixed
