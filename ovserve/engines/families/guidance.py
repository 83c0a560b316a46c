"""Classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598."""

from __future__ import annotations

from collections.abc import Sequence

from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32

__all__ = ["RowGuidance"]


class RowGuidance:
    """A picture with a guidance scale above 1 has a second row, without the prompt."""

    is_distilled = False

    def rows(self, work: Work) -> int:
        """Return 2 where the guidance scale has an effect, else 1."""
        return 2 if work.guidance_scale > 1 else 1

    def inputs(self, work: Work) -> dict[str, Array]:  # noqa: ARG002 - of the protocol
        """Return no inputs: the guidance scale acts on the predictions."""
        return {}

    def combine(self, predictions: Sequence[Array], work: Work) -> tuple[Array, Array]:
        """Return the guided prediction by equation 6, in the form u + g (c - u), and the difference c - u."""
        without, given = predictions
        difference: Array = given - without
        guided: Array = without + f32(work.guidance_scale) * difference
        return guided, difference

    def reuse(self, given: Array, difference: Array, work: Work) -> Array:
        """Return the same with the difference of an earlier step: u = c - (c - u)."""
        guided: Array = given + (f32(work.guidance_scale) - f32(1)) * difference
        return guided
