"""The Engine protocol: what the device loop asks of anything that denoises, and which engine a model gets.

An engine is driven by one thread, the device thread, in turns. A turn is one bounded piece of work: one UNet call for every
row in flight (`stepwise`), or one whole picture (`genai`). Between turns the device loop beats, lets new work in and drops
what was cancelled. Work is one picture: a request for n pictures is n pieces of work with seeds s, s+1, ...
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ovserve.errors import ApiError, InvalidValue, ModelError
from ovserve.models.profile import ModelProfile
from ovserve.models.steps import is_lcm
from ovserve.settings.options import ModelSettings
from ovserve.wire.request import ImageRequest

__all__ = [
    "CLIP_WINDOW",
    "Engine",
    "Outcome",
    "Preview",
    "Work",
    "check_served",
    "choose_engine",
    "has_t5",
    "longest_fitting",
    "overruns",
    "read_by_clip_alone",
    "warm_up_work",
]

CLIP_WINDOW = 77  # tokens that CLIP's text encoder reads, with those of begin and end: arXiv:2103.00020, section 2.4

Pixels = NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Work:
    """One picture to denoise.

    Attributes:
        job, picture: which request, and which of its pictures.
        mode: text2image, image2image, inpainting.
        initial_image: uint8 (H, W, 3), RGB, already at width x height; None for text2image.
        mask_image: uint8 (H, W), 255 = repaint, 0 = keep, already pooled so that no thin mask vanishes on the latent grid;
            None unless inpainting.
        width, height: working size, multiples of the profile's side_multiple_px.
        strength: 1.0 for text2image.
        scheduler: empty for the model's own.
        alone: shares no call with other jobs.
        previews: steps (1-based) after which `on_preview` wants an estimate of the final picture.
        on_step: called after each step with (step, steps); may be called from another thread; must not raise.
        on_preview: called with an estimate, off the critical path where the engine can.
        cancelled: set when nobody wants the picture any more; the engine stops at the next step.
    """

    job: str
    picture: int
    mode: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    strength: float
    seed: int
    initial_image: Pixels | None = None
    mask_image: Pixels | None = None
    prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_2: str = ""
    negative_prompt_3: str = ""
    max_sequence_length: int = 0
    scheduler: str = ""
    shortcuts: str = ""
    alone: bool = False
    previews: frozenset[int] = frozenset()
    on_step: Callable[[int, int], None] | None = None
    on_preview: Callable[[Preview], None] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Preview:
    """An estimate of the final picture after `step`: pixels uint8 (h, w, 3), RGB, possibly smaller than the result."""

    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a piece of work: pixels uint8 (H, W, 3), RGB; or an error; or neither, when it was cancelled."""

    work: Work
    pixels: Pixels | None = None
    error: ApiError | None = None


class Engine(Protocol):
    """Anything that denoises. Every method but `count_tokens` runs in the device thread."""

    name: str  # genai or stepwise
    capacity: int  # pictures in flight at once; known after `load`
    schedulers: frozenset[str]  # names a request may choose from
    tuned: dict[str, int]  # what `load` measured and chose, by option: the next incarnation is to have the same

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, then make one real picture.

        `beat(phase)` is called as often as possible, from any thread.
        """

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Tokens of a prompt, special tokens included, not truncated. Thread-safe; runs in the prepare thread.

        Args:
            clip: as CLIP's encoder counts them, where the family's whole prompt is read by another one.
        """

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        """The longest beginning of a prompt, at a word boundary, that fits the window. Thread-safe."""

    def admit(self, work: Work) -> None:
        """Let a piece of work join at the next turn. Never called beyond `capacity`."""

    def turn(self) -> Sequence[Outcome]:
        """Do one bounded piece of work; what has ended with it. Empty and at once when there is nothing to do."""

    def phase(self) -> str:
        """What the next turn will do: idle, encode, denoise or decode; heartbeats are judged by it."""

    def close(self) -> None:
        """Release the device."""


# Families whose denoiser is a UNet: what `stepwise` knows how to drive.
STEPWISE_FAMILIES = frozenset({"stable-diffusion", "lcm", "sdxl"})


def choose_engine(profile: ModelProfile, settings: ModelSettings) -> tuple[str, str]:
    """Which engine a model gets, and why: `auto` takes the one that serves this family best.

    Raises:
        ModelError: the configured engine cannot serve this model.
    """
    if settings.engine == "stepwise":
        if profile.family not in STEPWISE_FAMILIES:
            raise ModelError(
                f"model {profile.name}: engine stepwise serves {', '.join(sorted(STEPWISE_FAMILIES))}, and not {profile.family}"
            )
        return "stepwise", "configured"
    if settings.engine == "genai":
        return "genai", "configured"
    if profile.family not in STEPWISE_FAMILIES:
        return "genai", f"stepwise has no loop for family {profile.family}"
    if "NPU" in settings.device:
        return "genai", "NPUs want one static shape"
    return "stepwise", "proven bit-equal for this family, and pictures share its calls"


def warm_up_work(profile: ModelProfile, *, num_inference_steps: int) -> Work:
    """One real picture of the native size, as a client would have it, in the most demanding mode of the model: ready means that it
    has worked. The first inference also repacks the weights and takes the memory that a job will take."""
    size, with_mask = profile.native, "inpainting" in profile.tasks
    return Work(
        job="",
        picture=0,
        mode="inpainting" if with_mask else "text2image",
        prompt="a picture",
        negative_prompt="",
        width=size.width,
        height=size.height,
        num_inference_steps=num_inference_steps,
        guidance_scale=profile.defaults.guidance_scale,
        strength=1.0,
        seed=0,
        initial_image=np.full((size.height, size.width, 3), 127, np.uint8) if with_mask else None,
        mask_image=np.full((size.height, size.width), 255, np.uint8) if with_mask else None,
    )


def overruns(num_inference_steps: int, num_train_timesteps: int) -> bool:
    """Whether openvino_genai, at `timestep_spacing: trailing`, runs one step too many, at a timestep below zero.

    Its loop counts down in float32 from the number of training timesteps while above zero; for some step counts the last
    subtraction leaves a positive rest, and the picture is destroyed by a step beyond the end (measured: 9, 11, 12, 18, ...).
    """
    rest, step = np.float32(num_train_timesteps), np.float32(num_train_timesteps) / np.float32(num_inference_steps)
    for _ in range(num_inference_steps):
        rest = np.float32(rest - step)
    return bool(rest > 0)


def check_served(engine: str, profile: ModelProfile, asked: Work | ImageRequest) -> None:
    """Raise InvalidValue for a number of steps, or a choice, that this engine cannot run for this model."""
    scheduling = profile.scheduling
    steps, train = asked.num_inference_steps, scheduling.num_train_timesteps
    if steps < 1:
        raise InvalidValue("num_inference_steps: must be at least 1", param="num_inference_steps")
    if steps > train:
        raise InvalidValue(
            f"num_inference_steps: must be at most {train}, the timesteps the model was trained with",
            param="num_inference_steps",
        )
    if engine != "genai":
        return
    if scheduling.timestep_spacing == "trailing" and not is_lcm(profile, asked.scheduler) and overruns(steps, train):
        near = sorted(
            (count for count in range(1, 2 * steps + 2) if not overruns(count, train)),
            key=lambda count: abs(count - steps),
        )
        raise InvalidValue(
            f"num_inference_steps: this model's timestep spacing cannot be run in {steps} steps; "
            f"use {' or '.join(str(count) for count in sorted(near[:2]))}",
            param="num_inference_steps",
        )
    _check_frozen(profile, asked)


def _check_frozen(profile: ModelProfile, asked: Work | ImageRequest) -> None:
    """What the library fixes with the first picture it makes, which is the warm-up's, by the model's defaults."""
    if profile.family in ("sd3", "flux") and asked.max_sequence_length not in (0, profile.prompt_tokens):
        raise InvalidValue(
            f"max_sequence_length: this model's text encoder was prepared for {profile.prompt_tokens} tokens",
            param="max_sequence_length",
        )
    guided = profile.defaults.guidance_scale > 1
    if profile.family == "sd3" and (asked.guidance_scale > 1) != guided:
        side = "above 1: it was prepared with guidance" if guided else "at most 1: it was prepared without guidance"
        raise InvalidValue(f"guidance_scale: for this model it must be {side}", param="guidance_scale")


def read_by_clip_alone(profile: ModelProfile, asked: Work | ImageRequest) -> frozenset[str]:
    """Which of a request's texts no T5 encoder reads, in the families that have one beside CLIP's.

    CLIP's encoders read the prompt meant for each, T5 the last one; where that is not given, the first (Esser et al. 2024,
    arXiv:2403.03206, section 5; FLUX the same with one CLIP encoder).
    """
    if not has_t5(profile):
        return frozenset()
    if profile.family == "flux":
        return frozenset({"prompt"} if asked.prompt_2 else ())
    alone = {"prompt_2", "negative_prompt_2"}
    if asked.prompt_3:
        alone.add("prompt")
    if asked.negative_prompt_3:
        alone.add("negative_prompt")
    return frozenset(alone)


def has_t5(profile: ModelProfile) -> bool:
    """Whether a T5 encoder reads the prompt, whole, beside CLIP's encoders, which read CLIP_WINDOW tokens of it."""
    return profile.family in ("sd3", "flux") and profile.prompt_tokens > CLIP_WINDOW


def longest_fitting(prompt: str, count_tokens: Callable[[str], int], window: int) -> str:
    """The longest beginning of a prompt of at most `window` tokens.

    At a word boundary; where the word that goes beyond the window would leave more than half of it unused, as in a language that
    writes no blanks, inside that word, behind a whole character.
    """
    ends = [match.end() for match in re.finditer(r"\S+", prompt)]
    cut, more = _last_fitting(prompt, ends, count_tokens, window)
    if more and count_tokens(prompt[:cut]) <= window // 2:
        marks = "\u200d\ufe0e\ufe0f"  # joiner and variation selectors: they belong to the character before them
        inside = [
            end
            for end in range(cut + 1, more)
            if not unicodedata.combining(prompt[end]) and prompt[end] not in marks and prompt[end - 1] not in marks[0]
        ]
        cut = max(cut, _last_fitting(prompt, inside, count_tokens, window)[0])
    return prompt[:cut]


def _last_fitting(prompt: str, ends: Sequence[int], count_tokens: Callable[[str], int], window: int) -> tuple[int, int]:
    """The last of these ends up to which a prompt fits, 0 where none does, and the end after it, 0 behind the last."""
    low, high = 0, len(ends)
    while low < high:  # more text is never fewer tokens
        middle = (low + high + 1) // 2
        if count_tokens(prompt[: ends[middle - 1]]) <= window:
            low = middle
        else:
            high = middle - 1
    return (ends[low - 1] if low else 0), (ends[low] if low < len(ends) else 0)
