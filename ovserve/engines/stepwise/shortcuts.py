"""Shortcuts of a `quality` preset: steps without guidance, with that of an earlier step, or without the denoiser.

A guided step costs two rows. Shortcuts save rows and change pictures; without one, the engine is exact:

    guidance_every=N   compute the guidance difference at every N-th step and reuse it at the steps between, which then
                       cost one row: Castillo et al. 2023, arXiv:2312.12487; Lv et al. 2024, arXiv:2410.19355
                       (FasterCache)
    guidance_until=X   guidance on the first X (0..1) of the steps, the prompt alone on the rest: Kynkäänniemi et al.
                       2024, arXiv:2404.07724, and Castillo et al.
    guidance_from=X    no guidance before X (0..1) of the steps: Kynkäänniemi et al.
    denoise_every=N    run the denoiser at the first two steps, at every N-th step after them, and at the last one;
                       continue the line through its last two predictions at the steps between, which cost no row: the
                       first order of Liu et al. 2025, arXiv:2503.06923 (TaylorSeer), for the whole prediction

Syntax: `guidance_every=2,guidance_until=0.8`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["EXACT", "Shortcuts", "parse_shortcuts"]


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """The shortcuts of one picture; the defaults are exact."""

    guidance_every: int = 1
    guidance_from: float = 0.0
    guidance_until: float = 1.0
    denoise_every: int = 1

    def needs_denoiser(self, index: int, steps: int) -> bool:
        """Return whether the denoiser runs at step `index` of `steps`."""
        return index < 2 or index >= steps - 1 or (index - 1) % self.denoise_every == 0

    def is_guided(self, index: int, steps: int) -> bool:
        """Return whether guidance applies at step `index` of `steps`."""
        return self.guidance_from * steps <= index < self.guidance_until * steps

    def needs_both_rows(self, index: int, steps: int, computed_at: int | None) -> bool:
        """Return whether the guidance difference is computed at step `index` of `steps`.

        Args:
            index: the step, at which the denoiser runs.
            steps: the number of steps.
            computed_at: the step at which the difference was last computed; None: at none.
        """
        is_due = computed_at is None or index - computed_at >= self.guidance_every
        return is_due and self.is_guided(index, steps)


EXACT = Shortcuts()


def parse_shortcuts(text: str) -> Shortcuts:
    """Parse `name=value` pairs with commas between them; an empty text has no shortcuts.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    found: dict[str, float] = {}
    names = [field.name for field in fields(Shortcuts)]
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = pair.partition("=")
        if name not in names:
            raise ValueError(f"unknown shortcut {name!r}; use {', '.join(names[:-1])} or {names[-1]}")
        found[name] = float(value)
    start, end = found.get("guidance_from", 0.0), found.get("guidance_until", 1.0)
    for name in ("guidance_every", "denoise_every"):
        every = found.get(name, 1.0)
        if not every.is_integer() or every < 1:
            raise ValueError(f"{name} is {every:g}; it must be an integer of at least 1")
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"guidance_from is {start:g} and guidance_until is {end:g}; they must be within 0 to 1, in this order"
        )
    return Shortcuts(int(found.get("guidance_every", 1)), start, end, int(found.get("denoise_every", 1)))
