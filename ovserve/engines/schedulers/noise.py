"""The noise schedule of a diffusion model: configuration, cumulative alphas, noise levels and timesteps.

Everything is float32 in the order of operations of OpenVINO GenAI 2026.4, because bfloat16 amplifies the last bit of a
coefficient until it is visible in the picture. Comments mark where that order departs from the papers.

Notation: beta_t is the variance added at training timestep t = 0..T-1, abar_t the product of (1 - beta_s) up to t
(Ho et al. 2020, arXiv:2006.11239, section 2), sigma_t = sqrt((1 - abar_t) / abar_t) the noise level of the
variance-exploding view (Karras et al. 2022, arXiv:2206.00364, table 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.errors import ModelError
from ovserve.models.families import LCM_SCHEDULER

__all__ = [
    "Array",
    "SchedulerConfig",
    "alphas_cumprod",
    "interpolate",
    "karras_sigmas",
    "read_scheduler_config",
    "sigmas_of",
    "spaced_timesteps",
    "spaced_timesteps_shifted",
]

Array = NDArray[np.float32]
f32 = np.float32

# Defaults for keys missing in scheduler_config.json, by the scheduler that reads it, as in the library's classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": {"beta_schedule": "scaled_linear", "set_alpha_to_one": True},
    "pndm": {"beta_schedule": "linear", "set_alpha_to_one": False},
    "euler": {"beta_schedule": "scaled_linear", "set_alpha_to_one": True},
    "euler_ancestral": {"beta_schedule": "linear", "set_alpha_to_one": True},
    LCM_SCHEDULER: {
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": True,
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}
_OTHER_DEFAULTS: dict[str, Any] = {"beta_schedule": "linear", "set_alpha_to_one": True}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The content of scheduler_config.json, with the defaults of the scheduler that reads it. Names are the file's.

    Attributes:
        prediction_type: output of the UNet: `epsilon`, the noise, or `v_prediction`,
            sqrt(abar) epsilon - sqrt(1 - abar) x0 (Salimans and Ho 2022, arXiv:2202.00512, appendix D).
        timestep_spacing: leading, trailing, linspace (Lin et al. 2024, arXiv:2305.08891, table 2).
        final_sigma_min: the last sigma is that of t = 0 instead of zero; for Euler, DPM-Solver++ and UniPC.
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...]
    set_alpha_to_one: bool
    steps_offset: int
    prediction_type: str
    timestep_spacing: str
    rescale_betas_zero_snr: bool
    clip_sample: bool
    clip_sample_range: float
    original_inference_steps: int
    timestep_scaling: float
    final_sigma_min: bool

    @classmethod
    def parse(cls, document: Mapping[str, Any], scheduler: str) -> SchedulerConfig:
        """Parse the configuration as `scheduler` (one of our names) reads it.

        Raises:
            ModelError: a value is not supported.
        """
        defaults = _DEFAULTS.get(scheduler, _OTHER_DEFAULTS)

        def value(key: str, fallback: Any) -> Any:
            found = document.get(key)
            return defaults.get(key, fallback) if found is None else found

        def choice(key: str, fallback: str, known: tuple[str, ...]) -> str:
            found = str(value(key, fallback))
            if found not in known:
                raise ModelError(f"scheduler_config.json: {key} is {found!r}; expected one of {', '.join(known)}")
            return found

        for key in ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if document.get(key):
                raise ModelError(f"scheduler_config.json: {key} is {document[key]!r}, which is not supported")
        if scheduler == "euler":
            choice("interpolation_type", "linear", ("linear",))
            choice("timestep_type", "discrete", ("discrete",))
        return cls(
            num_train_timesteps=int(value("num_train_timesteps", 1000)),
            beta_start=float(value("beta_start", 0.0001)),
            beta_end=float(value("beta_end", 0.02)),
            beta_schedule=choice("beta_schedule", "linear", ("linear", "scaled_linear")),
            trained_betas=tuple(value("trained_betas", ())),
            set_alpha_to_one=bool(value("set_alpha_to_one", True)),
            steps_offset=int(value("steps_offset", 0)),
            prediction_type=choice("prediction_type", "epsilon", ("epsilon", "v_prediction")),
            timestep_spacing=choice("timestep_spacing", "leading", ("leading", "trailing", "linspace")),
            # The library's PNDM and LCM ignore this key.
            rescale_betas_zero_snr=bool(value("rescale_betas_zero_snr", False))
            and scheduler not in ("pndm", LCM_SCHEDULER),
            clip_sample=bool(value("clip_sample", False)),
            clip_sample_range=float(value("clip_sample_range", 1.0)),
            original_inference_steps=int(value("original_inference_steps", 50)),
            timestep_scaling=float(value("timestep_scaling", 10.0)),
            final_sigma_min=choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "sigma_min",
        )


def read_scheduler_config(directory: Path) -> dict[str, Any]:
    """Read the JSON object in `directory`/scheduler/scheduler_config.json.

    Raises:
        ModelError: the file cannot be read or holds no JSON object.
    """
    path = directory / "scheduler" / "scheduler_config.json"
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return document


def _linspace(start: np.float32, end: np.float32, count: int, *, endpoint: bool) -> Array:
    if count == 1:
        return np.array([start], f32)
    steps = count - 1 if endpoint else count
    delta = f32(f32(end - start) / f32(steps))
    values = start + delta * np.arange(count, dtype=f32)
    if endpoint:
        values[-1] = end
    return values


def _betas(config: SchedulerConfig, *, endpoint: bool) -> Array:
    count = config.num_train_timesteps
    start, end = f32(config.beta_start), f32(config.beta_end)
    if config.trained_betas:
        return np.array(config.trained_betas, f32)
    if config.beta_schedule == "scaled_linear":
        roots = _linspace(np.sqrt(start), np.sqrt(end), count, endpoint=endpoint)
        return roots * roots
    if endpoint:
        return start + f32(end - start) * np.arange(count, dtype=f32) / f32(count - 1)
    return _linspace(start, end, count, endpoint=False)


def _rescaled_to_zero_snr(betas: Array) -> Array:
    """Return betas whose last timestep is pure noise: Lin et al. 2024, arXiv:2305.08891, algorithm 1."""
    roots = np.sqrt(np.multiply.accumulate(f32(1) - betas))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * f32(first / f32(first - last))
    bars = roots * roots
    alphas = np.concatenate([bars[:1], bars[1:] / bars[:-1]])
    return f32(1) - alphas


def alphas_cumprod(config: SchedulerConfig, *, endpoint: bool = False) -> Array:
    """Return abar_t for t = 0..T-1: float32 (T,).

    Args:
        config: the model's configuration.
        endpoint: whether beta_{T-1} is exactly beta_end. In the library only LCM includes the endpoint; in the papers
            and in diffusers T betas always span the range with both ends.
    """
    betas = _betas(config, endpoint=endpoint)
    if config.rescale_betas_zero_snr:
        betas = _rescaled_to_zero_snr(betas)
    return np.multiply.accumulate(f32(1) - betas)


def sigmas_of(alphas: Array) -> Array:
    """Return sigma_t = sqrt((1 - abar_t) / abar_t): float32, the root computed in double as the library does."""
    ratios = (f32(1) - alphas) / alphas
    return np.array([math.sqrt(float(ratio)) for ratio in ratios], f32)


def interpolate(timesteps: tuple[int, ...], values: Array) -> Array:
    """Return `values` at integer timesteps as the library interpolates them: (y1 - y0) + y0, in float32."""
    found = []
    for t in timesteps:
        if t <= 0:
            found.append(values[0])
        elif t >= len(values) - 1:
            found.append(values[-1])
        else:
            low, high = values[t - 1], values[t]
            found.append(f32(f32(high - low) + low))
    return np.array(found, f32)


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _trailing(config: SchedulerConfig, count: int) -> tuple[int, ...]:
    """Return T - 1, T - T/n - 1, ...: n = `count` timesteps.

    The library counts down in float32 until zero, and for some n (9, 11, 12, 18, 21, ...) rounding ends just above
    zero. It then adds a timestep of -1, which it reads out of bounds. This function stops after n.
    """
    ratio = f32(config.num_train_timesteps) / f32(count)
    at, found = f32(config.num_train_timesteps), []
    for _ in range(count):
        found.append(_round_half_up(float(at)) - 1)
        at = f32(at - ratio)
    return tuple(found)


def _clamp_to_schedule(config: SchedulerConfig, timesteps: tuple[int, ...]) -> tuple[int, ...]:
    # With n = T, steps_offset moves the first timestep beyond the schedule; the library reads out of bounds there.
    return tuple(min(t, config.num_train_timesteps - 1) for t in timesteps)


def spaced_timesteps(config: SchedulerConfig, count: int) -> tuple[int, ...]:
    """Return `count` training timesteps, falling, for DDIM, PNDM and Euler: arXiv:2305.08891, table 2."""
    total = config.num_train_timesteps
    if config.timestep_spacing == "trailing":
        return _trailing(config, count)
    if config.timestep_spacing == "linspace":
        points = _linspace(f32(0), f32(total - 1), count, endpoint=True)
        return tuple(_round_half_up(float(t)) for t in points[::-1])
    ratio = total // count
    return _clamp_to_schedule(config, tuple(i * ratio + config.steps_offset for i in reversed(range(count))))


def spaced_timesteps_shifted(config: SchedulerConfig, count: int) -> tuple[int, ...]:
    """Return `count` training timesteps, falling, as diffusers spaces them for DPM-Solver++ and UniPC.

    Leading and linspace spacing make n + 1 timesteps and drop the lowest.
    """
    total = config.num_train_timesteps
    if config.timestep_spacing == "trailing":
        return tuple(round(total - i * total / count) - 1 for i in range(count))
    if config.timestep_spacing == "linspace":
        rising = np.rint(np.linspace(0, total - 1, count + 1)).astype(int).tolist()
        return tuple(reversed(rising[1:]))
    ratio = total // (count + 1)
    return _clamp_to_schedule(config, tuple(i * ratio + config.steps_offset for i in reversed(range(1, count + 1))))


def karras_sigmas(lowest: float, highest: float, count: int, rho: float = 7.0) -> NDArray[np.float64]:
    """Return `count` noise levels from `highest` down to `lowest`: Karras et al. 2022, arXiv:2206.00364, equation 5."""
    ramp = np.linspace(0.0, 1.0, count)
    low, high = lowest ** (1 / rho), highest ** (1 / rho)
    levels: NDArray[np.float64] = (high + ramp * (low - high)) ** rho
    return levels
