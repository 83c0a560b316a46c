"""Flow matching: the schedules and Euler steps of rectified-flow transformers.

The model predicts the velocity v = noise - x0 on the straight path x_s = s noise + (1 - s) x0, and a step follows it
from level s to the next one: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206, section 2.
The levels s are evenly spaced, then shifted towards noise: by a constant (arXiv:2403.03206, equation 23), or by
exp(mu), where mu depends on the size of the picture (`shift_linear`, `shift_empirical`).

Everything has the order of operations and the types of OpenVINO GenAI 2026.4: its pictures are equal to the last bit.
"""

# ruff: noqa: ARG001, ARG002 (plans, shifts and schedules have one signature each; not all use all parameters)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import History, Plan, StepResult
from ovserve.errors import InvalidValue, ModelError

__all__ = ["FlowConfig", "FlowPlan", "FlowScheduler", "constant_levels", "shift_empirical", "shift_linear"]

CELLS_PER_TOKEN = 4  # latents go into a transformer in patches of 2x2


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """The content of scheduler_config.json. Names are the file's.

    Attributes:
        shift: constant shift of the levels, where `use_dynamic_shifting` is false.
        shift_terminal: the last level before zero, to which the schedule is stretched; None: not stretched.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> FlowConfig:
        """Parse scheduler_config.json.

        Raises:
            ModelError: a value is not supported.
        """
        unsupported = (
            "stochastic_sampling",
            "invert_sigmas",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
        )
        for key in unsupported:
            if document.get(key):
                raise ModelError(f"scheduler_config.json: {key} is {document[key]!r}, which is not supported")
        default = cls()
        values: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            if document.get(name) is not None:
                kind = type(getattr(default, name))
                values[name] = (float if kind is type(None) else kind)(document[name])
        config = cls(**values)
        if config.max_image_seq_len <= config.base_image_seq_len or config.num_train_timesteps < 1:
            raise ModelError("scheduler_config.json: max_image_seq_len must be above base_image_seq_len")
        return config


# Returns mu for a picture of so many tokens, denoised in so many steps.
Shift = Callable[[FlowConfig, int, int], float]


def shift_linear(config: FlowConfig, tokens: int, count: int) -> float:
    """Return mu, a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift): FLUX.1."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def shift_empirical(config: FlowConfig, tokens: int, count: int) -> float:
    """Return mu as FLUX.2 was tuned: lines over the tokens for 10 and for 200 steps, and a line between them."""
    few = (8.73809524e-05, 1.89833333)
    many = (0.00016927, 0.45666666)
    at_200 = many[0] * tokens + many[1]
    if tokens > 4300:
        return at_200
    at_10 = few[0] * tokens + few[1]
    slope = (at_200 - at_10) / 190.0
    return slope * count + (at_200 - 200.0 * slope)


def _linspace(first: float, last: float, count: int) -> list[float]:
    if count == 1:
        return [first]
    return [first, *(first + ((last - first) / (count - 1)) * i for i in range(1, count - 1)), last]


def _shifted_levels(config: FlowConfig, count: int, mu: float) -> Array:
    """Return the levels 1, ..., 1/count, shifted: float32 (count,)."""
    levels = np.array(_linspace(1.0, 1.0 / count, count), np.float64).astype(f32)
    if config.use_dynamic_shifting:
        factor = f32(math.exp(mu))
        return _stretched(config, factor / (factor + (f32(1) / levels - f32(1))))
    shift = f32(config.shift)
    return _stretched(config, shift * levels / (f32(1) + (shift - f32(1)) * levels))


def _stretched(config: FlowConfig, levels: Array) -> Array:
    """Return the levels, stretched so that the last one is `shift_terminal`."""
    if config.shift_terminal is None:
        return levels.astype(f32)
    rest = f32(1) - levels
    if rest[-1] == 0:
        return levels.astype(f32)  # a single step starts from pure noise: there is nothing to stretch
    scale = f32(rest[-1] / (f32(1) - f32(config.shift_terminal)))
    return (f32(1) - rest / scale).astype(f32)


def constant_levels(config: FlowConfig, count: int, mu: float) -> Array:
    """Return SD3's levels: float32 (count,), computed in double. The constant shift applies twice, as in diffusers."""
    shift, total = config.shift, config.num_train_timesteps

    def shifted(level: float) -> float:
        return shift * level / (1 + (shift - 1) * level)

    highest, lowest = (float(f32(shifted(float(f32(t)) / total))) for t in (total, 1))
    steps = _linspace(highest * total, lowest * total, count)
    return np.array([shifted(step / total) for step in steps], np.float64).astype(f32)


@dataclass(frozen=True, slots=True)
class FlowPlan(Plan):
    """Euler steps along the velocity: arXiv:2209.03003, algorithm 1. `sigmas` has `count` levels and then zero."""

    sigmas: Array

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """Return x_s = s noise + (1 - s) x0 at the level of step `index`."""
        sigma = self.sigmas[self.start + index]
        noised: Array = sigma * noise + (f32(1) - sigma) * clean
        return noised

    def step(self, prediction: Array, latents: Array, index: int, history: History, noise: Array | None) -> StepResult:
        """Follow the velocity to the next level; x0 is where it leads at level zero."""
        here, after = self.sigmas[self.start + index], self.sigmas[self.start + index + 1]
        found: Array = latents + f32(after - here) * prediction
        return StepResult(found, latents - here * prediction)


class FlowScheduler:
    """The schedule of one model; makes plans. Immutable and thread-safe.

    Args:
        document: scheduler_config.json.
        shift: returns mu for a picture; used where the model shifts dynamically.
        levels: returns the levels of a schedule.

    Raises:
        ModelError: a value of the configuration is not supported.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        shift: Shift = shift_linear,
        levels: Callable[[FlowConfig, int, float], Array] = _shifted_levels,
    ) -> None:
        name = str(document.get("_class_name") or "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ModelError(f"scheduler {name!r} is not supported; this model needs FlowMatchEulerDiscreteScheduler")
        self.config = FlowConfig.parse(document)
        self._shift = shift
        self._levels = levels

    def plan(self, num_inference_steps: int, strength: float, cells: int) -> FlowPlan:
        """Make the plan of one picture.

        Args:
            num_inference_steps: steps of the whole schedule.
            strength: which part of it runs.
            cells: latent cells of the picture.

        Raises:
            InvalidValue: `num_inference_steps` is out of range, or strength leaves no step to run.
        """
        count, total = num_inference_steps, self.config.num_train_timesteps
        if not 1 <= count <= total:
            raise InvalidValue(
                f"num_inference_steps is {count}; this model allows 1 to {total}", param="num_inference_steps"
            )
        mu = self._shift(self.config, cells // CELLS_PER_TOKEN, count)
        levels = self._levels(self.config, count, mu)
        run = min(f32(count) * f32(strength), f32(count))
        start = int(max(f32(count) - run, f32(0)))
        if start >= count:
            raise InvalidValue(
                f"strength is {strength:g}, which with {count} steps leaves no step to run; raise one of them",
                param="strength",
            )
        timesteps = tuple(float(t) for t in (levels * f32(total)).astype(f32)[start:])
        return FlowPlan(timesteps, count, start, f32(1), np.append(levels, f32(0)).astype(f32))
