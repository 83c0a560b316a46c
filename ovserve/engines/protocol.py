"""The Engine protocol: what an engine can do, and what it does.

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

from ovserve.errors import ApiError
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import Resolution
from ovserve.wire.messages import Counts
from ovserve.wire.request import ImageRequest

__all__ = [
    "CLIP_WINDOW",
    "Engine",
    "Features",
    "Outcome",
    "Preview",
    "Work",
    "clip_only_fields",
    "has_t5",
    "truncate_to_window",
    "warm_up_size",
    "warm_up_work",
]

WARM_UP_SIDE_PX = 256  # longest side of the warm-up's picture, if the denoiser has at least LARGE_DENOISER_BYTES
LARGE_DENOISER_BYTES = 1 << 30  # a step at 1024 pixels takes seconds from here on
CLIP_WINDOW = 77  # tokens that CLIP's text encoder reads, start and end tokens included: arXiv:2103.00020, section 2.4

Pixels = NDArray[np.uint8]

OnSpan = Callable[[str, float, float, int], None]

_NO_REQUEST = ImageRequest(task="generation", prompt="")  # of work that no client requested: every value is the default


@dataclass(slots=True, eq=False)
class Work:
    """One picture to denoise.

    Attributes:
        job, picture: id of the request, and number of the picture within it.
        mode: text2image, image2image, inpainting.
        initial_image: uint8 (H, W, 3), RGB, already at width x height; None for text2image.
        mask_image: uint8 (H, W), 255 = repaint, 0 = keep, already pooled so that no thin mask vanishes on the latent
            grid; None unless inpainting.
        reference_images: what a model that edits by reference sees, in the order of the request, the edited image
            first: uint8 (h, w, 3) each, RGB, at most 1 megapixel, sides multiples of the profile's side_multiple_px.
            Empty for models that start from the image, and for text2image.
        width, height: working size, multiples of the profile's side_multiple_px.
        guidance_scale: in terms of equation 6 in Ho and Salimans 2022, arXiv:2207.12598; 1 or less is no guidance.
        strength: 1.0 for text2image.
        scheduler: empty for the model's own.
        alone: shares no call with other jobs.
        previews: steps (1-based) after which `on_preview` is to get an estimate of the final picture.
        on_step: called after each step with (step, steps); may be called from another thread; must not raise.
        on_preview: called with an estimate, where possible without delaying the next step.
        on_span: called with (stage, monotonic begin, monotonic end, rows) when a stage of the picture has ended: text,
            encode, call, decode. None for work that is not traced. May be called from other threads; must not raise.
        cancelled: set when the picture is not needed any more; the engine stops at the next step.
        request: the request of the picture. An engine reads from it each value that preparation passes on unchanged and
            that has no attribute here, so that a new request field needs no new attribute.
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
    reference_images: tuple[Pixels, ...] = ()
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
    on_span: OnSpan | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    request: ImageRequest = _NO_REQUEST


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


@dataclass(frozen=True, slots=True)
class Features:
    """What an engine can do with its model. Each of these is read by code that is the same for all engines.

    Attributes:
        tasks: those of text2image, image2image, inpainting that it serves.
        schedulers: names that a request may choose; known after `load`.
        previews: it estimates the final picture during the steps.
        references: the most reference images of one request; 0 where an edit starts from its one image.
    """

    tasks: frozenset[str]
    schedulers: frozenset[str] = frozenset()
    previews: bool = False
    references: int = 0


class Engine(Protocol):
    """An engine denoises pictures. Runs in: the device thread.

    `check`, `count_tokens` and `cut_prompt` are thread-safe and run in the prepare thread too.
    """

    name: str  # genai or stepwise
    capacity: int  # pictures in flight at once; known after `load`
    features: Features
    precision: str  # that the compiled denoiser computes in, such as f32; known after `load`; empty: unknown
    tuned: dict[str, int]  # options that `load` chose by measuring; the next incarnation must use the same

    def counts(self) -> Counts:
        """Return what it has counted since its creation. Thread-safe."""

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, then make one real picture.

        Args:
            beat: sends a heartbeat with the phase; called as often as possible, from any thread.

        Raises:
            ModelError: the model cannot be loaded.
        """

    def check(self, request: Work | ImageRequest) -> None:
        """Check that this engine can do what a request asks of its model, as far as that depends on the engine.

        Raises:
            InvalidValue: it cannot; names the field.
            InternalError: a preset of the model asks for something that the engine does not have.
        """

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Count all tokens of a prompt, special tokens included.

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

    def use_idle_time(self) -> bool:
        """Do a short piece of work that makes later pictures faster; return False if there is none left.

        Called when there is no picture to make. A picture that arrives meanwhile waits for it.
        """

    def close(self) -> None:
        """Release the device."""


def warm_up_work(profile: ModelProfile, *, num_inference_steps: int, size: Resolution | None = None) -> Work:
    """Return work for the warm-up: one real picture, in the most demanding mode of the model.

    A worker is ready only after it has made a picture. The first inference also repacks the weights and allocates the
    memory that a job needs.

    Args:
        profile: the model.
        num_inference_steps: number of steps.
        size: of the picture; None: the native size.
    """
    size, with_mask = size or profile.native, "inpainting" in profile.tasks
    with_image = with_mask or "text2image" not in profile.tasks
    return Work(
        job="",
        picture=0,
        mode="inpainting" if with_mask else "image2image" if with_image else "text2image",
        prompt="a picture",
        negative_prompt="",
        width=size.width,
        height=size.height,
        num_inference_steps=num_inference_steps,
        guidance_scale=profile.traits.engine_guidance(profile.defaults.guidance_scale),
        strength=1.0,
        seed=0,
        initial_image=np.full((size.height, size.width, 3), 127, np.uint8) if with_image else None,
        mask_image=np.full((size.height, size.width), 255, np.uint8) if with_mask else None,
    )


def warm_up_size(profile: ModelProfile) -> Resolution:
    """Return the size of the warm-up's picture: the native one, or a small one of a large transformer.

    Two steps at 1024 x 1024 pixels are 4096 tokens each: minutes of a CPU for billions of weights. The weights are
    repacked at any size.
    """
    weights = profile.directory / profile.traits.denoiser / "openvino_model.bin"
    size = weights.stat().st_size if weights.is_file() else 0  # without it, `load` fails with a clear message
    if not profile.traits.is_transformer or size < LARGE_DENOISER_BYTES:
        return profile.native
    step = profile.side_multiple_px
    longest = max(profile.native.width, profile.native.height, WARM_UP_SIDE_PX)

    def scaled(side: int) -> int:
        return max(step, side * WARM_UP_SIDE_PX // longest // step * step)

    return Resolution(scaled(profile.native.width), scaled(profile.native.height))


def clip_only_fields(profile: ModelProfile, request: Work | ImageRequest) -> frozenset[str]:
    """Return which text fields of a request only CLIP's encoders read, in the families that also have a T5 encoder.

    Each CLIP encoder reads its own prompt, and T5 the last one; an encoder for which none was given reads the
    first (Esser et al. 2024, arXiv:2403.03206, section 5; FLUX the same with one CLIP encoder).
    """
    t5 = profile.traits.t5
    if t5 is None or not has_t5(profile):
        return frozenset()
    alone = set()
    for name in ("prompt", "negative_prompt") if profile.takes_negative_prompt else ("prompt",):
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
