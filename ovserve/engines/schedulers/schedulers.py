"""Schedulers by name: how a picture goes from one noise level to the next.

A scheduler's name and a model's configuration give a `Plan` for one picture: the timesteps of its UNet calls, and a
pure `step` between them.

    ddim              Song et al. 2021, arXiv:2010.02502, equation 12 with eta = 0
    pndm              Liu et al. 2022, arXiv:2202.09778, linear multistep form (no Runge-Kutta warm-up)
    euler             Karras et al. 2022, arXiv:2206.00364, algorithm 1 without the second-order correction
    euler_ancestral   the same with part of the noise drawn anew each step (k-diffusion)
    lcm               Luo et al. 2023, arXiv:2310.04378, multistep consistency sampling
    dpmpp_2m          Lu et al. 2022, arXiv:2211.01095, DPM-Solver++(2M), algorithm 2
    dpmpp_2m_karras   the same on the noise levels of arXiv:2206.00364, equation 5
    unipc             Zhao et al. 2023, arXiv:2302.04867, UniPC of order 2 with B(h) = exp(h) - 1

The first five (`samplers`) compute what OpenVINO GenAI 2026.4 computes, to the last bit. The last three (`solvers`),
which it lacks, agree with diffusers within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ovserve.engines.schedulers.noise import (
    SchedulerConfig,
    alphas_cumprod,
    f32,
    interpolate,
    karras_sigmas,
    sigmas_of,
    spaced_timesteps,
    spaced_timesteps_shifted,
)
from ovserve.engines.schedulers.plans import History, Plan, StepResult, root
from ovserve.engines.schedulers.samplers import DdimPlan, EulerAncestralPlan, EulerPlan, LcmPlan, PndmPlan
from ovserve.engines.schedulers.solvers import DpmPlan, UnipcPlan
from ovserve.errors import InvalidValue, ModelError
from ovserve.models.families import LCM_SCHEDULER
from ovserve.models.steps import steps_run

__all__ = ["LIBRARY_SCHEDULERS", "SCHEDULERS", "History", "Plan", "Scheduler", "StepResult", "scheduler_name"]

# The library's class names without "Scheduler", as in scheduler_config.json and profile.Scheduling.
LIBRARY_SCHEDULERS: dict[str, str] = {
    "DDIM": "ddim",
    "LMSDiscrete": "ddim",  # the library substitutes DDIM
    "PNDM": "pndm",
    "EulerDiscrete": "euler",
    "EulerAncestralDiscrete": "euler_ancestral",
    "LCM": LCM_SCHEDULER,
}

SOLVERS = ("dpmpp_2m", "dpmpp_2m_karras", "unipc")
SCHEDULERS = frozenset(LIBRARY_SCHEDULERS.values()) | frozenset(SOLVERS)


def scheduler_name(document: Mapping[str, Any], class_name: str) -> str:
    """Return our name for the scheduler of a model's directory.

    Args:
        document: scheduler_config.json.
        class_name: the class where `document` names none.

    Raises:
        ModelError: none of our schedulers computes it.
    """
    stem = str(document.get("_class_name") or class_name).removesuffix("Scheduler")
    if stem not in LIBRARY_SCHEDULERS:
        raise ModelError(f"scheduler {stem!r} is not supported; use one of {', '.join(LIBRARY_SCHEDULERS)}")
    return LIBRARY_SCHEDULERS[stem]


class Scheduler:
    """One scheduler with one model's configuration; makes plans. Immutable and thread-safe once made.

    Raises:
        ModelError: this scheduler does not support a value of the configuration.
    """

    def __init__(self, name: str, document: Mapping[str, Any]) -> None:
        self.name = name
        self.config = SchedulerConfig.parse(document, name)
        if name == "pndm" and not document.get("skip_prk_steps", False):
            raise ModelError("scheduler_config.json: skip_prk_steps must be true for pndm")
        self.alphas = alphas_cumprod(self.config, endpoint=name == LCM_SCHEDULER or name in SOLVERS)
        if self.config.rescale_betas_zero_snr and name != "ddim":
            self.alphas[-1] = f32(2.0**-24)  # sigma must stay finite; the value that diffusers uses
        # DDIM, PNDM and LCM need no sigmas; with zero terminal SNR, the last one of DDIM would be infinite.
        self._sigmas = self.alphas if name in ("ddim", "pndm", LCM_SCHEDULER) else sigmas_of(self.alphas)

    def plan(self, num_inference_steps: int, strength: float, cells: int = 0) -> Plan:  # noqa: ARG002
        """Make the plan of one picture, which does not depend on its number of latent `cells`.

        Raises:
            InvalidValue: `num_inference_steps` is out of range, or strength leaves no step to run.
        """
        count = num_inference_steps
        if not 1 <= count <= self.config.num_train_timesteps:
            raise InvalidValue(
                f"num_inference_steps is {count}; this model allows 1 to {self.config.num_train_timesteps}",
                param="num_inference_steps",
            )
        start = count - steps_run(count, strength)
        if self.name == LCM_SCHEDULER:
            plan = self._lcm(count, strength)
        else:
            plan = self._solver(count, start) if self.name in SOLVERS else self._spaced(count, start)
        if not plan.timesteps:
            raise InvalidValue(
                f"strength is {strength:g}, which with {count} steps leaves no step to run; raise one of them",
                param="strength",
            )
        return plan

    def _spaced(self, count: int, start: int) -> Plan:
        config, alphas = self.config, self.alphas
        steps = spaced_timesteps(config, count)
        if self.name == "ddim":
            return DdimPlan(steps[start:], count, start, f32(1), config, alphas)
        if self.name == "pndm":
            # One step more than requested: the second timestep comes twice (a single step stays single).
            repeated = (*steps[:2], *steps[1:]) if count > 1 else steps
            return PndmPlan(repeated[start:], count, start, f32(1), config, alphas)
        last = self._sigmas[0] if config.final_sigma_min and self.name == "euler" else f32(0)
        sigmas = np.append(interpolate(steps, self._sigmas), last).astype(f32)
        kind = EulerPlan if self.name == "euler" else EulerAncestralPlan
        return kind(steps[start:], count, start, self._init_sigma(sigmas.max()), config, alphas, sigmas)

    def _init_sigma(self, highest: np.float32) -> np.float32:
        if self.config.timestep_spacing != "leading":
            return highest
        if self.name == "euler":
            return root(f32(f32(highest * highest) + f32(1)))
        return f32(math.sqrt(float(highest) ** 2 + 1.0))

    def _solver(self, count: int, start: int) -> Plan:
        config = self.config
        steps = spaced_timesteps_shifted(config, count)
        levels = np.asarray(self._sigmas, np.float64)
        sigmas = levels[list(steps)]
        if self.name == "dpmpp_2m_karras":
            sigmas = karras_sigmas(float(levels[0]), float(levels[-1]), count)
            indices = np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
            steps = tuple(int(index) for index in np.rint(indices))
        kind = UnipcPlan if self.name == "unipc" else DpmPlan
        last = float(levels[0]) if config.final_sigma_min else 0.0
        return kind(steps[start:], count, start, f32(1), config, self.alphas, np.append(sigmas, last))

    def _lcm(self, count: int, strength: float) -> Plan:
        """Take every k-th training timestep, and of these `count`: arXiv:2310.04378, section 4.3."""
        config = self.config
        stride = config.num_train_timesteps // config.original_inference_steps
        size = int(f32(f32(config.original_inference_steps) * f32(strength)))
        if size < count:
            # With more steps than timesteps, the library reads out of bounds or repeats timesteps.
            raise InvalidValue(
                f"num_inference_steps is {count}; at strength {strength:g} this model allows at most {size}",
                param="num_inference_steps",
            )
        falling = [(i + 1) * stride - 1 for i in reversed(range(size))]
        delta = f32(f32(size) / f32(count))
        steps = tuple(falling[int(f32(delta * f32(i)))] for i in range(count))
        return LcmPlan(steps, count, 0, f32(1), config, self.alphas)
