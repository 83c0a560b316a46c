"""The Engine protocol, and the checks of a request that depend on the engine.

One thread, the device thread, drives an engine in turns. A turn is one bounded amount of work: one UNet call for every
row in flight (`stepwise`), or one whole picture (`genai`). Between turns the device loop sends heartbeats, admits new
work and drops cancelled work. `Work` is one picture: a request for n pictures is n of them with seeds s, s+1, ...
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

from ovserve.errors import ApiError, InvalidValue
from ovserve.models.profile import ModelProfile
from ovserve.models.steps import is_lcm
from ovserve.wire.request import ImageRequest

__all__ = [
    "CLIP_WINDOW",
    "Engine",
    "Outcome",
    "Preview",
    "Work",
    "check_served",
    "clip_only_fields",
    "has_t5",
    "runs_extra_step",
    "truncate_to_window",
    "warm_up_work",
]

CLIP_WINDOW = 77  # tokens that CLIP's text encoder reads, start and end tokens included: arXiv:2103.00020, section 2.4

Pixels = NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Work:
    """One picture to denoise.

    Attributes:
        job, picture: id of the request, and number of the picture within it.
        mode: text2image, image2image, inpainting.
        initial_image: uint8 (H, W, 3), RGB, already at width x height; None for text2image.
        mask_image: uint8 (H, W), 255 = repaint, 0 = keep, already pooled so that no thin mask vanishes on the latent
            grid; None unless inpainting.
        width, height: working size, multiples of the profile's side_multiple_px.
        strength: 1.0 for text2image.
        scheduler: empty for the model's own.
        alone: shares no call with other jobs.
        previews: steps (1-based) after which `on_preview` is to get an estimate of the final picture.
        on_step: called after each step with (step, steps); may be called from another thread; must not raise.
        on_preview: called with an estimate, where possible without delaying the next step.
        cancelled: set when the picture is not needed any more; the engine stops at the next step.
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
    """An estimate of the final picture after `step`: pixels uint8 (h, w, 3), RGB; may be smaller than the result."""

    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one `Work`: pixels uint8 (H, W, 3), RGB; or an error; or neither, if it was cancelled."""

    work: Work
    pixels: Pixels | None = None
    error: ApiError | None = None


class Engine(Protocol):
    """An engine denoises pictures. All methods but `count_tokens` and `cut_prompt` run in the device thread."""

    name: str  # genai or stepwise
    capacity: int  # pictures in flight at once; known after `load`
    schedulers: frozenset[str]  # names that a request may choose
    tuned: dict[str, int]  # options that `load` chose by measuring; the next incarnation must use the same

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, then make one real picture.

        Args:
            beat: sends a heartbeat with the phase; called as often as possible, from any thread.

        Raises:
            ModelError: the model cannot be loaded.
        """

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Count all tokens of a prompt, special tokens included. Thread-safe; runs in the prepare thread.

        Args:
            prompt: the text.
            clip: count with CLIP's tokenizer, in families where another encoder reads the whole prompt.

        Raises:
            InvalidValue: the text cannot be encoded.
        """

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        """Return the longest prefix of a prompt that fits the window; see `truncate_to_window`. Thread-safe."""

    def admit(self, work: Work) -> None:
        """Add work, which joins at the next turn. Never called beyond `capacity`."""

    def turn(self) -> Sequence[Outcome]:
        """Do one bounded amount of work and return what has ended. With nothing to do, return () at once."""

    def phase(self) -> str:
        """Return what the next turn will do: idle, encode, denoise or decode. The heartbeat limit depends on it."""

    def close(self) -> None:
        """Release the device."""


def warm_up_work(profile: ModelProfile, *, num_inference_steps: int) -> Work:
    """Return work for the warm-up: one real picture of the native size, in the most demanding mode of the model.

    A worker is ready only after it has made a picture. The first inference also repacks the weights and allocates the
    memory that a job needs.
    """
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


def runs_extra_step(num_inference_steps: int, num_train_timesteps: int) -> bool:
    """Return whether openvino_genai, at `timestep_spacing: trailing`, runs one step too many, at a timestep below zero.

    Its loop counts down in float32 from the number of training timesteps while above zero. For some step counts (9, 11,
    12, 18, ..., measured) the last subtraction leaves a positive remainder, and the extra step destroys the picture.
    """
    rest, step = np.float32(num_train_timesteps), np.float32(num_train_timesteps) / np.float32(num_inference_steps)
    for _ in range(num_inference_steps):
        rest = np.float32(rest - step)
    return bool(rest > 0)


def check_served(engine: str, profile: ModelProfile, request: Work | ImageRequest) -> None:
    """Check the step count and the other values that this engine cannot always run for this model.

    Raises:
        InvalidValue: the engine cannot run one of them.
    """
    scheduling = profile.scheduling
    steps, train = request.num_inference_steps, scheduling.num_train_timesteps
    if steps < 1:
        raise InvalidValue(f"num_inference_steps is {steps}; it must be at least 1", param="num_inference_steps")
    if steps > train:
        raise InvalidValue(
            f"num_inference_steps is {steps}; it must be at most {train}, the timesteps the model was trained with",
            param="num_inference_steps",
        )
    if engine != "genai":
        return
    if (
        scheduling.timestep_spacing == "trailing"
        and not is_lcm(profile, request.scheduler)
        and runs_extra_step(steps, train)
    ):
        near = sorted(
            (count for count in range(1, 2 * steps + 2) if not runs_extra_step(count, train)),
            key=lambda count: abs(count - steps),
        )
        raise InvalidValue(
            f"num_inference_steps is {steps}, which this model's timestep spacing does not allow; "
            f"use {' or '.join(str(count) for count in sorted(near[:2]))}",
            param="num_inference_steps",
        )
    _check_fixed_values(profile, request)


def _check_fixed_values(profile: ModelProfile, request: Work | ImageRequest) -> None:
    """Check the values that the library fixes with its first picture: that of the warm-up, with the model's defaults.

    Raises:
        InvalidValue: the request needs another value.
    """
    if profile.traits.t5 is not None and request.max_sequence_length not in (0, profile.prompt_tokens):
        raise InvalidValue(
            f"max_sequence_length is {request.max_sequence_length}; this model allows only {profile.prompt_tokens}",
            param="max_sequence_length",
        )
    guided = profile.defaults.guidance_scale > 1
    if profile.traits.fixes_guidance and (request.guidance_scale > 1) != guided:
        bound = "above 1, because it was loaded with guidance" if guided else "at most 1, because it was loaded without"
        raise InvalidValue(
            f"guidance_scale is {request.guidance_scale:g}; for this model it must be {bound}", param="guidance_scale"
        )


def clip_only_fields(profile: ModelProfile, request: Work | ImageRequest) -> frozenset[str]:
    """Return which text fields of a request only CLIP's encoders read, in the families that also have a T5 encoder.

    Each CLIP encoder reads its own prompt, and T5 the last one; an encoder for which none was given reads the
    first (Esser et al. 2024, arXiv:2403.03206, section 5; FLUX the same with one CLIP encoder).
    """
    t5 = profile.traits.t5
    if t5 is None or not has_t5(profile):
        return frozenset()
    alone = set()
    for name in ("prompt", "negative_prompt") if profile.traits.takes_negative_prompt else ("prompt",):
        alone |= {f"{name}_{number}" for number in range(2, t5.number)}
        if getattr(request, f"{name}_{t5.number}"):
            alone.add(name)
    return frozenset(alone)


def has_t5(profile: ModelProfile) -> bool:
    """Return whether a T5 encoder reads the whole prompt, while CLIP's encoders read CLIP_WINDOW tokens of it."""
    return profile.traits.t5 is not None and profile.prompt_tokens > CLIP_WINDOW


def truncate_to_window(prompt: str, count_tokens: Callable[[str], int], window: int) -> str:
    """Return the longest prefix of a prompt of at most `window` tokens that ends at a word boundary.

    If that leaves at least half of the window unused, as in a language without spaces, the prefix ends inside the next
    word, after a whole character.
    """
    ends = [match.end() for match in re.finditer(r"\S+", prompt)]
    cut, beyond = _last_end_within(prompt, ends, count_tokens, window)
    if beyond and count_tokens(prompt[:cut]) <= window // 2:
        marks = "\u200d\ufe0e\ufe0f"  # joiner and variation selectors belong to the character before them
        inside = [
            end
            for end in range(cut + 1, beyond)
            if not unicodedata.combining(prompt[end]) and prompt[end] not in marks and prompt[end - 1] not in marks[0]
        ]
        cut = max(cut, _last_end_within(prompt, inside, count_tokens, window)[0])
    return prompt[:cut]


def _last_end_within(
    prompt: str, ends: Sequence[int], count_tokens: Callable[[str], int], window: int
) -> tuple[int, int]:
    """Return the last of `ends` up to which a prompt fits, or 0; and the one after it, or 0."""
    low, high = 0, len(ends)
    while low < high:  # binary search: more text never has fewer tokens
        middle = (low + high + 1) // 2
        if count_tokens(prompt[: ends[middle - 1]]) <= window:
            low = middle
        else:
            high = middle - 1
    return (ends[low - 1] if low else 0), (ends[low] if low < len(ends) else 0)
