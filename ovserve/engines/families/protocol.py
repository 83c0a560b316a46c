"""The protocol `Family`: everything that differs between model families for an engine with its own loop.

The engine owns the loop: which pictures share a call, which slot runs it, what is cached, what is cancelled. A family
says what a call contains and what its results mean. Latents are always in the layout of the VAE, float32 (1, C, h, w);
a family whose denoiser takes another layout converts them in `feed` and `run`.

Invariant: a row of a call does not depend on the other rows, so that load never changes the bytes of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.schedulers.schedulers import Scheduler

__all__ = ["Conditions", "DenoiserRow", "Encode", "Family", "Feed", "Feeds", "Guidance", "Types"]

Feed = dict[str, NDArray[Any]]  # the inputs of one call by name
Types = Mapping[str, Any]  # the dtype of each input that a model's denoiser has, by name

# Embeds texts with the text encoder of an index: one tuple of arrays, without a batch axis, for each text.
Encode = Callable[[int, Sequence[str]], Sequence[tuple[Array, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Denoiser inputs of one picture besides latents and timestep: two rows (without and with the prompt), or one.

    Attributes:
        arrays: by the denoiser's input name, float32 (rows, ...).
        rows: 2 with classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), else 1.
    """

    arrays: dict[str, Array]
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class DenoiserRow:
    """One row of a call.

    Attributes:
        sample: latents, scaled for the step, and the extra channels of an inpainting model: (1, channels, h, w).
        timestep: the training timestep of the step.
        conditions: those of the picture.
        index: which row of the conditions.
    """

    sample: Array
    timestep: int
    conditions: Conditions
    index: int


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
    """How the guidance scale acts: through a second row, or through an input of the denoiser."""

    is_distilled: bool  # the model is distilled for its own scheduler, and others cannot run it

    def rows(self, work: Work) -> int:
        """Return how many rows of conditions a picture has: 1 or 2."""

    def inputs(self, work: Work) -> dict[str, Array]:
        """Return the denoiser inputs that carry the guidance scale, (1, ...) each."""

    def combine(self, without: Array, given: Array, scale: float) -> tuple[Array, Array]:
        """Return the guided prediction, and the difference that `reuse` takes.

        Args:
            without: the prediction without the prompt.
            given: the prediction with the prompt.
            scale: the guidance scale.
        """

    def reuse(self, given: Array, difference: Array, scale: float) -> Array:
        """Return the guided prediction from the one with the prompt and the difference of an earlier step."""


class Family(Protocol):
    """One model of a family. Immutable and thread-safe.

    Attributes:
        denoiser: directory of the denoiser's component.
        inputs: names of all inputs that a denoiser of this family may have.
        required_inputs: those that it must have; `timestep` is one of them.
        channels: channels of the denoiser's sample.
        takes_mask: the denoiser takes mask and masked image as additional channels.
        vae_overflows_float16: the VAE gives wrong pictures in float16.
        guidance: how the guidance scale acts.
    """

    denoiser: str
    inputs: frozenset[str]
    required_inputs: tuple[str, ...]
    channels: int
    takes_mask: bool
    vae_overflows_float16: bool
    guidance: Guidance

    def check_channels(self, latent_channels: int) -> None:
        """Check the denoiser's channels against those of the VAE.

        Raises:
            ModelError: they do not fit.
        """

    def schedulers(self, document: Mapping[str, Any], class_name: str) -> tuple[str, dict[str, Scheduler]]:
        """Return the name of the model's own scheduler, and all schedulers that can run the model, by name.

        Args:
            document: scheduler_config.json.
            class_name: the scheduler's class where `document` names none.

        Raises:
            ModelError: the model's own scheduler, or its configuration, is not supported.
        """

    def embedding_outputs(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return which outputs of a text encoder with this configuration make the embedding of a text."""

    def conditions(self, work: Work, encode: Encode) -> Conditions:
        """Return the conditions of a picture."""

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

    def sharing_key(self, latents: Array, timestep: int, *, timestep_per_row: bool) -> Hashable:
        """Return a key of a picture in flight: pictures with equal keys may share a call."""

    def feeds(self, shapes: Mapping[str, tuple[int, ...]], types: Types, cells: tuple[int, int], tokens: int) -> Feeds:
        """Return inputs for measuring.

        Args:
            shapes: dimensions of each input without the batch axis; 0 where they are dynamic.
            types: dtypes of the same inputs.
            cells: height and width of the latents at the native size.
            tokens: length of the model's window.
        """
