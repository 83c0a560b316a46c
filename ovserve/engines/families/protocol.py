"""The protocol `Family`: everything that differs between model families for an engine with its own loop.

The engine owns the loop: which pictures share a call, which slot runs it, what is cached, what is cancelled. A family
says how a picture starts, what a call contains and what its results mean. Latents are always in the layout of the VAE,
float32 (1, C, h, w); a family whose denoiser takes another layout converts them in `feed` and `run`, one whose VAE
takes another range in `start` and `decoder_input`.

Invariant: a row of a call does not depend on the other rows, so that load never changes the bytes of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from ovserve.engines.families.blend import Blend
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.vae import Draw, Moments, VaeConfig
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.schedulers.plans import Plan

__all__ = [
    "Conditions",
    "Context",
    "DenoiserRow",
    "Encode",
    "Family",
    "Feed",
    "Feeds",
    "Guidance",
    "PlanMaker",
    "Source",
    "Start",
    "Types",
]

Feed = dict[str, NDArray[Any]]  # the inputs of one call by name
Types = Mapping[str, Any]  # the dtype of each input that a model's denoiser has, by name

# Embeds texts with the text encoder of an index: one tuple of arrays, without a batch axis, for each text.
Encode = Callable[[int, Sequence[str]], Sequence[tuple[NDArray[Any], ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Denoiser inputs of one picture besides latents and timestep, for each row: the last one is with the prompt.

    Attributes:
        arrays: by the denoiser's input name, (rows, ...).
        rows: 1; 2 or more with classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
    """

    arrays: dict[str, NDArray[Any]]
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a picture's latents are denoised beside, the same at each step.

    Attributes:
        channels: added to the channels of the denoiser's sample, in its layout: (1 or rows, ...); None: nothing.
        tokens: of reference images, added behind those of the picture: float32 (1, S, C); None: none.
        positions: of these tokens: (1, S, axes).
        layout: pictures share calls only if their layouts are equal.
    """

    channels: Array | None = None
    tokens: Array | None = None
    positions: NDArray[Any] | None = None
    layout: Hashable = ()


NO_CONTEXT = Context()


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A picture before its first step.

    Attributes:
        latents: float32 (1, C, h, w), at the noise level of the first step.
        draw: the seed's stream of noise, after what the start drew from it.
        blend: restores the kept part of a masked edit after each step; None where the model does that, or keeps none.
        context: what the latents are denoised beside.
    """

    conditions: Conditions
    latents: Array
    draw: Draw
    blend: Blend | None = None
    context: Context = NO_CONTEXT


@dataclass(frozen=True, slots=True)
class Source:
    """What a family makes a `Start` of. Exceptions of infer requests are passed on.

    Attributes:
        vae: the configuration of the VAE.
        embed: embeds texts; cached.
        moments: encodes an image with the VAE; cached by content. With a mask, the part to repaint is gray.
        draw: the stream of noise of the picture's seed.
    """

    vae: VaeConfig
    embed: Encode
    moments: Callable[[Pixels, Pixels | None], Moments]
    draw: Draw


@dataclass(frozen=True, slots=True, eq=False)
class DenoiserRow:
    """One row of a call.

    Attributes:
        sample: latents, scaled for the step: (1, C, h, w).
        timestep: the training timestep of the step.
        conditions: those of the picture.
        index: which row of the conditions.
        context: what the latents are denoised beside.
    """

    sample: Array
    timestep: float
    conditions: Conditions
    index: int
    context: Context = field(default=NO_CONTEXT)


class PlanMaker(Protocol):
    """A scheduler with one model's configuration."""

    def plan(self, num_inference_steps: int, strength: float, cells: int) -> Plan:
        """Make the plan of a picture of so many latent cells. Raises InvalidValue."""


class Feeds(Protocol):
    """Inputs of the native size for measuring a denoiser, filled with the same values each time."""

    def of(self, rows: int, *, timestep_per_row: bool = True) -> Feed:
        """Return inputs with `rows` rows; row i is the same for every value of `rows`.

        Args:
            rows: number of rows.
            timestep_per_row: give each row a different timestep, instead of all rows that of the first.
        """

    def second(self, *, timestep_per_row: bool = True) -> Feed:
        """Return the second row of `of(2)` alone."""

    def quarter(self) -> tuple[Feeds, int]:
        """Return feeds of half the width and height, and the ratio of the areas, 4.

        If the denoiser could not work at such sides, return these feeds and 1.
        """


class Guidance(Protocol):
    """How the guidance scale acts: through further rows, or through an input of the denoiser."""

    is_distilled: bool  # the model is distilled for its own scheduler, and others cannot run it

    def rows(self, work: Work) -> int:
        """Return how many rows of conditions a picture has."""

    def inputs(self, work: Work) -> dict[str, Array]:
        """Return the denoiser inputs that carry the guidance scale, (1, ...) each."""

    def combine(self, predictions: Sequence[Array], work: Work) -> tuple[Array, Array]:
        """Return the guided prediction, and the difference that `reuse` takes.

        Args:
            predictions: those of all rows, in order.
            work: the picture.
        """

    def reuse(self, given: Array, difference: Array, work: Work) -> Array:
        """Return the guided prediction from that of the last row and the difference of an earlier step."""


class Family(Protocol):
    """One model of a family. Immutable and thread-safe.

    Attributes:
        denoiser: directory of the denoiser's component.
        inputs: names of all inputs that a denoiser of this family may have.
        required_inputs: those that it must have; `timestep` is one of them.
        texts: the text encoders, in the order in which `conditions` counts them.
        main_text: which of them reads the whole prompt.
        vae_overflows_float16: the VAE gives wrong pictures in float16.
        guidance: how the guidance scale acts.
    """

    denoiser: str
    inputs: frozenset[str]
    required_inputs: tuple[str, ...]
    texts: tuple[TextEncoder, ...]
    main_text: int
    vae_overflows_float16: bool
    guidance: Guidance

    def check_channels(self, latent_channels: int) -> None:
        """Check the denoiser's channels against those of the VAE.

        Raises:
            ModelError: they do not fit.
        """

    def schedulers(self, document: Mapping[str, Any], class_name: str) -> tuple[str, dict[str, PlanMaker]]:
        """Return the name of the model's own scheduler, and all schedulers that can run the model, by name.

        The name is empty where the model has one scheduler and requests cannot choose.

        Args:
            document: scheduler_config.json.
            class_name: the scheduler's class where `document` names none.

        Raises:
            ModelError: the model's own scheduler, or its configuration, is not supported.
        """

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the conditions of a picture."""

    def start(self, work: Work, plan: Plan, source: Source) -> Start:
        """Return a picture's start: its conditions, first latents and context, with the library's random draws."""

    def decoder_input(self, latents: Array) -> Array:
        """Return what the VAE decoder gets for clean latents."""

    def feed(self, rows: Sequence[DenoiserRow], types: Types, *, timestep_per_row: bool) -> Feed:
        """Return the inputs of one call.

        Args:
            rows: the rows; their pictures have equal sharing keys.
            types: the inputs of this model's denoiser.
            timestep_per_row: whether the call takes a timestep for each row, or one for all.
        """

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the denoiser and return a copy of the predictions, in the layout of the latents: (rows, C, h, w).

        Raises:
            RuntimeError: the call failed, or the denoiser cannot work at this size.
        """

    def sharing_key(self, latents: Array, start: Start, timestep: float, *, timestep_per_row: bool) -> Hashable:
        """Return a key of a picture in flight: pictures with equal keys may share a call."""

    def feeds(self, shapes: Mapping[str, tuple[int, ...]], types: Types, cells: tuple[int, int], tokens: int) -> Feeds:
        """Return inputs for measuring.

        Args:
            shapes: dimensions of each input without the batch axis; 0 where they are dynamic.
            types: dtypes of the same inputs.
            cells: height and width of the latents at the native size.
            tokens: length of the model's window.
        """
