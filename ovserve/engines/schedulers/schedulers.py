"""Noise schedulers as pure array functions: how a picture goes from one noise level to the next.

A scheduler's name and a model's configuration give a `Plan` for one picture: the timesteps its UNet calls visit, and a pure `step`
between them. State that a scheduler carries from step to step (earlier predictions) travels through `history`; noise that it adds
is handed in. So one plan can be stepped in any order among others, and a step can be repeated.

    ddim              Song et al. 2021, arXiv:2010.02502, equation 12 with eta = 0
    pndm              Liu et al. 2022, arXiv:2202.09778, linear multistep form (no Runge-Kutta warm-up)
    euler             Karras et al. 2022, arXiv:2206.00364, algorithm 1 without the second-order correction
    euler_ancestral   the same with part of the noise drawn anew each step (k-diffusion)
    lcm               Luo et al. 2023, arXiv:2310.04378, multistep consistency sampling
    dpmpp_2m          Lu et al. 2022, arXiv:2211.01095, DPM-Solver++(2M), algorithm 2
    dpmpp_2m_karras   the same on the noise levels of arXiv:2206.00364, equation 5
    unipc             Zhao et al. 2023, arXiv:2302.04867, UniPC of order 2 with B(h) = exp(h) - 1

The first five compute what OpenVINO GenAI 2026.4 computes, to the last bit: float32, its order of operations, double where it has
double. The last three, which the library lacks, agree with diffusers within rounding. Arrays are float32 (1, C, H/8, W/8).
"""

# ruff: noqa: ARG002 (a plan's methods have one signature; most schedulers leave some of it unused)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovserve.engines.schedulers.noise import (
    Array,
    SchedulerConfig,
    alphas_cumprod,
    f32,
    interpolate,
    karras_sigmas,
    sigmas_of,
    spaced_timesteps,
    spaced_timesteps_shifted,
)
from ovserve.errors import InvalidValue, ModelError
from ovserve.models.steps import steps_run

__all__ = ["LIBRARY_SCHEDULERS", "SCHEDULERS", "Plan", "Scheduler", "Stepped", "scheduler_name"]

History = tuple[Array, ...]

# The library's class names, less "Scheduler", as scheduler_config.json and profile.Scheduling have them.
LIBRARY_SCHEDULERS: dict[str, str] = {
    "DDIM": "ddim",
    "LMSDiscrete": "ddim",  # as the library reads it
    "PNDM": "pndm",
    "EulerDiscrete": "euler",
    "EulerAncestralDiscrete": "euler_ancestral",
    "LCM": "lcm",
}

SOLVERS = ("dpmpp_2m", "dpmpp_2m_karras", "unipc")
SCHEDULERS = frozenset(LIBRARY_SCHEDULERS.values()) | frozenset(SOLVERS)


def _root(value: np.float32) -> np.float32:
    return f32(np.sqrt(value))


def _divided(array: Array, by: np.float32) -> Array:
    quotient: Array = np.divide(array, by, dtype=f32)
    return quotient


@dataclass(frozen=True, slots=True)
class Stepped:
    """What one step made of the latents.

    Attributes:
        latents: at the next noise level; what the next UNet call sees.
        clean: the predicted clean latents, x0: what a preview shows.
        history: to be handed to the next step.
        decoded: what the VAE decoder gets if this step was the last; None: the latents.
    """

    latents: Array
    clean: Array
    history: History = ()
    decoded: Array | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The walk of one picture. Immutable; `index` counts the steps it runs, from 0.

    Attributes:
        timesteps: the training timestep of each UNet call, falling.
        start: how many steps of the whole schedule strength leaves out.
        init_sigma: scale of pure noise at the first timestep.
    """

    config: SchedulerConfig
    alphas: Array
    timesteps: tuple[int, ...]
    count: int
    start: int
    init_sigma: np.float32

    def scale_input(self, latents: Array, index: int) -> Array:
        """The latents as the UNet was trained to see them at this step."""
        return latents

    def draws_noise(self, index: int) -> bool:
        """Whether `step` at `index` wants fresh standard normal noise."""
        return False

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Clean latents brought to the noise level of step `index`: arXiv:2006.11239, equation 4."""
        alpha = self.alphas[self.timesteps[index]]
        noised: Array = _root(alpha) * clean + f32(math.sqrt(1.0 - float(alpha))) * noise
        return noised

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """One step: `prediction` is the UNet's output at `timesteps[index]`, after guidance; `latents` not scaled."""
        raise NotImplementedError

    def _clean_and_noise(self, prediction: Array, latents: Array, alpha: np.float32) -> tuple[Array, Array]:
        """x0 and epsilon of a prediction: arXiv:2010.02502, equation 12; for v: arXiv:2202.00512, appendix D."""
        signal, rest = _root(alpha), _root(f32(1) - alpha)
        if self.config.prediction_type == "epsilon":
            return _divided(latents - rest * prediction, signal), prediction
        return signal * latents - rest * prediction, signal * prediction + rest * latents


@dataclass(frozen=True, slots=True)
class DdimPlan(Plan):
    """arXiv:2010.02502, equation 12, eta = 0."""

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """Equation 12: the predicted x0 and noise, mixed anew at the level of the timestep one stride before."""
        t = self.timesteps[index]
        before = t - self.config.num_train_timesteps // self.count
        clean, epsilon = self._clean_and_noise(prediction, latents, self.alphas[t])
        if self.config.clip_sample:
            bound = f32(self.config.clip_sample_range)
            clean = np.clip(clean, -bound, bound)
        alpha = self.alphas[before] if before >= 0 else _final_alpha(self.config, self.alphas)
        found = _root(alpha) * clean + _root(f32(1) - alpha) * epsilon
        return Stepped(found, clean)


@dataclass(frozen=True, slots=True)
class PndmPlan(Plan):
    """arXiv:2202.09778: equation 11 (the transfer), and for the predictions it is fed with, table 6's linear multistep weights.

    The second timestep comes twice: step 1 repeats step 0 with the mean of both predictions. History: the last predictions as
    the UNet made them, oldest first; between steps 0 and 1 also the latents to go back to.
    """

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """Equation 11 from the timestep to the one a stride before, with the multistep mean of the last predictions (equation 12)."""
        stride = self.config.num_train_timesteps // self.count
        t = self.timesteps[index]
        before = t - stride
        if index == 1:
            (first, latents), before, t = history, t, t + stride
            kept: History = (first,)
            blended = (prediction + first) / f32(2)
        else:
            kept = (*history, prediction)[-4:]
            blended = _multistep(kept)
        found, clean = self._transfer(blended, latents, min(t, self.config.num_train_timesteps - 1), before)
        return Stepped(found, clean, (*kept, latents) if index == 0 else kept)

    def _transfer(self, output: Array, latents: Array, t: int, before: int) -> tuple[Array, Array]:
        alpha = self.alphas[t]
        alpha_before = self.alphas[before] if before >= 0 else _final_alpha(self.config, self.alphas)
        rest, rest_before = f32(1) - alpha, f32(1) - alpha_before
        weight = _root(f32(alpha_before / alpha))
        divisor = alpha * _root(rest_before) + _root(f32(f32(alpha * rest) * alpha_before))
        clean, _ = self._clean_and_noise(output, latents, alpha)
        if self.config.prediction_type == "v_prediction":
            output = _root(alpha) * output + _root(rest) * latents
        return weight * latents - (alpha_before - alpha) * output / divisor, clean


@dataclass(frozen=True, slots=True)
class EulerPlan(Plan):
    """arXiv:2206.00364, algorithm 1 without its second-order part: x + (x - x0) / sigma * (sigma' - sigma)."""

    sigmas: Array  # of the whole schedule, then the last one

    def scale_input(self, latents: Array, index: int) -> Array:
        """Divided by sqrt(sigma^2 + 1): arXiv:2206.00364, table 1, c_in. In double, as the library does."""
        sigma = float(self.sigmas[self.start + index])
        return (latents.astype(np.float64) / math.sqrt(sigma * sigma + 1.0)).astype(f32)

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """arXiv:2206.00364, section 2: the variance-exploding view, in which noise is only added."""
        noised: Array = clean + self.sigmas[self.start + index] * noise
        return noised

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """Algorithm 1 without the correction: along the derivative (x - x0) / sigma from this level to the next. The library decodes x0."""
        sigma, after = self.sigmas[self.start + index], self.sigmas[self.start + index + 1]
        clean = self._clean(prediction, latents, sigma)
        found = ((latents - clean) / sigma) * f32(after - sigma) + latents
        return Stepped(found, clean, decoded=clean)

    def _clean(self, prediction: Array, latents: Array, sigma: np.float32) -> Array:
        if self.config.prediction_type == "epsilon":
            return latents - prediction * sigma
        square = float(sigma) * float(sigma) + 1.0
        rest = prediction.astype(np.float64) * (-float(sigma) / math.sqrt(square))
        return (rest + latents.astype(np.float64) / square).astype(f32)


@dataclass(frozen=True, slots=True)
class EulerAncestralPlan(EulerPlan):
    """Euler down to sigma_down, then fresh noise of sigma_up, so that both together are the next sigma.

    sigma_up is the noise of ancestral sampling in the variance-exploding view: Song et al. 2021, arXiv:2011.13456, appendix F.
    """

    def draws_noise(self, index: int) -> bool:
        """Always: the library draws at the last step too, and later draws depend on it."""
        return True

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """The same along the derivative down to sigma_down, then sigma_up times `noise`. Raises ValueError without noise."""
        if noise is None:
            raise ValueError("euler_ancestral: a step needs noise")
        sigma, after = self.sigmas[self.start + index], self.sigmas[self.start + index + 1]
        clean = self._clean(prediction, latents, sigma)
        here, there = float(sigma) ** 2, float(after) ** 2
        up = f32(math.sqrt(there * (here - there) / here))
        down = f32(math.sqrt(there - float(up) ** 2))
        derivative = (latents - clean) / sigma
        found = (latents + derivative * f32(down - sigma)) + noise * up
        return Stepped(found, clean, decoded=clean)


@dataclass(frozen=True, slots=True)
class LcmPlan(Plan):
    """arXiv:2310.04378, algorithm 3 (multistep sampling); boundary conditions c_skip and c_out of arXiv:2303.01469, appendix C."""

    def draws_noise(self, index: int) -> bool:
        """Between steps, not after the last."""
        return index != self.count - 1

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """As the base, but with the root of the rest in float32."""
        alpha = self.alphas[self.timesteps[index]]
        return _root(alpha) * clean + _root(f32(1) - alpha) * noise

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """Algorithm 3, one round: x0 by the consistency function c_skip x + c_out x0(x), then noised anew for the next timestep.

        Raises:
            ValueError: no noise before the last step.
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
            return Stepped(denoised, clean, decoded=denoised)
        if noise is None:
            raise ValueError("lcm: a step before the last needs noise")
        alpha = self.alphas[self.timesteps[index + 1]]
        found = _root(alpha) * denoised + _root(f32(1) - alpha) * noise
        return Stepped(found, clean, decoded=denoised)


@dataclass(frozen=True, slots=True)
class SolverPlan(Plan):
    """Exponential integrators of the probability-flow ODE in half-logarithmic signal-to-noise ratio lambda = log(alpha / sigma).

    arXiv:2211.01095, section 3.1; at noise level s of the variance-exploding view, alpha = 1 / sqrt(s^2 + 1), sigma = s alpha, so
    lambda = -log(s). Coefficients in double. The last step is of order 1 and lands on x0, where lambda is infinite.
    """

    sigmas: np.ndarray[Any, np.dtype[np.float64]]  # of the whole schedule, then zero

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Clean latents at the noise level of step `index`; a Karras level lies between two timesteps."""
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
            return _divided(latents - sigma * prediction, alpha)
        return alpha * latents - sigma * prediction

    def _is_last(self, index: int) -> bool:
        return index == len(self.timesteps) - 1

    def _transfer(self, latents: Array, clean: Array, index: int) -> tuple[Array, float]:
        """The step of order 1 from `index` to the next level, and the factor of what higher orders add."""
        _, sigma = self._scales(index)
        alpha_next, sigma_next = self._scales(index + 1)
        factor = -alpha_next * math.expm1(self._lambda(index) - self._lambda(index + 1))
        return f32(sigma_next / sigma) * latents + f32(factor) * clean, factor


@dataclass(frozen=True, slots=True)
class DpmPlan(SolverPlan):
    """DPM-Solver++(2M): arXiv:2211.01095, algorithm 2. History: the clean latents predicted one step before."""

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """Algorithm 2, one round: order 1 where there is no step before, and at the last; else with the slope of x0 over lambda."""
        clean = self._predicted_clean(prediction, latents, index)
        found, factor = self._transfer(latents, clean, index)
        if history and not self._is_last(index):
            here = self._lambda(index)
            ratio = (here - self._lambda(index - 1)) / (self._lambda(index + 1) - here)
            found = found + f32(factor * 0.5 / ratio) * (clean - history[0])
        return Stepped(found, clean, (clean,))


@dataclass(frozen=True, slots=True)
class UnipcPlan(SolverPlan):
    """UniPC-2, data prediction: arXiv:2302.04867, algorithms 5 and 6, and table 1's B2(h) = exp(h) - 1.

    Each step first corrects the latents it was given, now that their prediction is known, then predicts the next.
    History: the latents of the step before (corrected), its predicted clean latents, and those of the step before that.
    """

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> Stepped:
        """Algorithm 6 (UniP) after algorithm 5 (UniC) of the latents given: order 1 at the first step and the last, else 2."""
        clean = self._predicted_clean(prediction, latents, index)
        if history:
            latents = self._corrected(clean, index, history)
        found, factor = self._transfer(latents, clean, index)
        if self._order(index) == 2:
            ratio = self._ratio(index)
            found = found + f32(factor * 0.5 / ratio) * (history[1] - clean)
        return Stepped(found, clean, (latents, clean, *history[1:2]))

    def _order(self, index: int) -> int:
        return 1 if index == 0 or self._is_last(index) else 2

    def _ratio(self, index: int) -> float:
        """(lambda of the step before - lambda here) / (lambda of the next - lambda here): negative."""
        here = self._lambda(index)
        return (self._lambda(index - 1) - here) / (self._lambda(index + 1) - here)

    def _corrected(self, clean: Array, index: int, history: History) -> Array:
        """The latents of `index` again, from the step before, with the prediction made there: algorithm 5 (UniC)."""
        before, older = index - 1, history[1]
        found, factor = self._transfer(history[0], older, before)
        h = self._lambda(index) - self._lambda(before)
        scale = math.expm1(-h)
        first = scale / -h - 1.0
        if self._order(before) == 1:
            found += f32(factor * 0.5) * (clean - older)
            return found
        ratio = self._ratio(before)
        right = (first / scale, 2.0 * (first / -h - 0.5) / scale)
        weights = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array(right))
        slope = _divided(history[2] - older, f32(ratio))
        found += f32(factor * weights[0]) * slope + f32(factor * weights[1]) * (clean - older)
        return found


def _final_alpha(config: SchedulerConfig, alphas: Array) -> np.float32:
    """abar before timestep 0."""
    return f32(1) if config.set_alpha_to_one else alphas[0]


def _multistep(kept: History) -> Array:
    """Adams-Bashforth weights of order 1 to 4 over the last predictions, newest last: arXiv:2202.09778, equation 12."""
    if len(kept) == 1:
        return kept[0]
    if len(kept) == 2:
        return _divided(f32(3) * kept[1] - kept[0], f32(2))
    if len(kept) == 3:
        return _divided(f32(23) * kept[2] - f32(16) * kept[1] + f32(5) * kept[0], f32(12))
    mixed: Array = f32(55) * kept[3] - f32(59) * kept[2] + f32(37) * kept[1] - f32(9) * kept[0]
    mixed *= f32(f32(1) / f32(24))
    return mixed


def scheduler_name(document: Mapping[str, Any], class_name: str) -> str:
    """The name of ours for the scheduler a model's directory names. Raises ModelError when there is none."""
    stem = str(document.get("_class_name") or class_name).removesuffix("Scheduler")
    if stem not in LIBRARY_SCHEDULERS:
        raise ModelError(f"scheduler {stem!r} is not one that ovserve's own loop computes")
    return LIBRARY_SCHEDULERS[stem]


class Scheduler:
    """One scheduler over one model's configuration; makes plans. Immutable and thread-safe once made.

    Raises:
        ModelError: the configuration asks for what this scheduler does not compute.
    """

    def __init__(self, name: str, document: Mapping[str, Any]) -> None:
        self.name = name
        self.config = SchedulerConfig.parse(document, name)
        if name == "pndm" and not document.get("skip_prk_steps", False):
            raise ModelError("scheduler_config.json: pndm without skip_prk_steps is not supported")
        self.alphas = alphas_cumprod(self.config, endpoint=name == "lcm" or name in SOLVERS)
        if self.config.rescale_betas_zero_snr and name != "ddim":
            self.alphas[-1] = f32(2.0**-24)  # sigma must stay finite; diffusers' own value
        # DDIM, PNDM and LCM need none; with zero terminal SNR, DDIM's last would be infinite.
        self._sigmas = self.alphas if name in ("ddim", "pndm", "lcm") else sigmas_of(self.alphas)

    def plan(self, num_inference_steps: int, strength: float) -> Plan:
        """The walk of one picture.

        Raises:
            InvalidValue: strength leaves no step to run.
        """
        count = num_inference_steps
        if not 1 <= count <= self.config.num_train_timesteps:
            raise InvalidValue(
                f"num_inference_steps must be within 1..{self.config.num_train_timesteps}", param="num_inference_steps"
            )
        start = count - steps_run(count, strength)
        if self.name == "lcm":
            plan = self._lcm(count, strength)
        else:
            plan = self._solver(count, start) if self.name in SOLVERS else self._spaced(count, start)
        if not plan.timesteps:
            raise InvalidValue(f"strength {strength:g} with {count} steps leaves no step to run", param="strength")
        return plan

    def _spaced(self, count: int, start: int) -> Plan:
        config, alphas = self.config, self.alphas
        steps = spaced_timesteps(config, count)
        if self.name == "ddim":
            return DdimPlan(config, alphas, steps[start:], count, start, f32(1))
        if self.name == "pndm":
            # One step more than asked for: the second timestep twice (a single step stays single).
            repeated = (*steps[:2], *steps[1:]) if count > 1 else steps
            return PndmPlan(config, alphas, repeated[start:], count, start, f32(1))
        last = self._sigmas[0] if config.final_sigma_min and self.name == "euler" else f32(0)
        sigmas = np.append(interpolate(steps, self._sigmas), last).astype(f32)
        kind = EulerPlan if self.name == "euler" else EulerAncestralPlan
        return kind(config, alphas, steps[start:], count, start, self._init_sigma(sigmas.max()), sigmas)

    def _init_sigma(self, highest: np.float32) -> np.float32:
        if self.config.timestep_spacing != "leading":
            return highest
        if self.name == "euler":
            return _root(f32(f32(highest * highest) + f32(1)))
        return f32(math.sqrt(float(highest) ** 2 + 1.0))

    def _solver(self, count: int, start: int) -> Plan:
        config = self.config
        steps = spaced_timesteps_shifted(config, count)
        levels = np.asarray(self._sigmas, np.float64)
        sigmas = levels[list(steps)]
        if self.name == "dpmpp_2m_karras":
            sigmas = karras_sigmas(float(levels[0]), float(levels[-1]), count)
            places = np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
            steps = tuple(int(place) for place in np.rint(places))
        kind = UnipcPlan if self.name == "unipc" else DpmPlan
        return kind(config, self.alphas, steps[start:], count, start, f32(1), np.append(sigmas, 0.0))

    def _lcm(self, count: int, strength: float) -> Plan:
        """arXiv:2310.04378, section 4.3: every k-th training timestep, of which `count` are skipped through."""
        config = self.config
        stride = config.num_train_timesteps // config.original_inference_steps
        size = int(f32(f32(config.original_inference_steps) * f32(strength)))
        if size < count:
            # The library reads out of bounds here, or repeats timesteps.
            raise InvalidValue(
                f"num_inference_steps {count} at strength {strength:g}: this model's schedule has {size} steps there",
                param="num_inference_steps",
            )
        falling = [(i + 1) * stride - 1 for i in reversed(range(size))]
        delta = f32(f32(size) / f32(count))
        steps = tuple(falling[int(f32(delta * f32(i)))] for i in range(count))
        return LcmPlan(config, self.alphas, steps, count, 0, f32(1))
