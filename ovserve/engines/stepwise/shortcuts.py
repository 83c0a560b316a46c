"""Shortcuts of a `quality` preset: guidance only on a part of the steps, or with the difference of an earlier step.

A guided step costs two rows. Shortcuts save rows and change pictures; without one, the engine is exact:

    guidance_every=N   compute the guidance difference at every N-th step and reuse it at the steps between, which then
                       cost one row: Castillo et al. 2023, arXiv:2312.12487; Lv et al. 2024, arXiv:2410.19355
                       (FasterCache)
    guidance_until=X   guidance on the first X (0..1) of the steps, the prompt alone on the rest: Kynkäänniemi et al.
                       2024, arXiv:2404.07724, and Castillo et al.
    guidance_from=X    no guidance before X (0..1) of the steps: Kynkäänniemi et al.

Syntax: `guidance_every=2,guidance_until=0.8`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXACT", "Shortcuts", "parse_shortcuts"]


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """The shortcuts of one picture; the defaults are exact."""

    guidance_every: int = 1
    guidance_from: float = 0.0
    guidance_until: float = 1.0

    def is_guided(self, index: int, steps: int) -> bool:
        """Return whether guidance applies at step `index` of `steps`."""
        return self.guidance_from * steps <= index < self.guidance_until * steps

    def needs_both_rows(self, index: int, steps: int) -> bool:
        """Return whether the difference is computed at this step: at the first guided step, and every N-th after it."""
        if not self.is_guided(index, steps):
            return False
        first = next(step for step in range(steps) if self.is_guided(step, steps))
        return (index - first) % self.guidance_every == 0


EXACT = Shortcuts()


def parse_shortcuts(text: str) -> Shortcuts:
    """Parse `name=value` pairs with commas between them; an empty text has no shortcuts.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    found: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = pair.partition("=")
        if name not in ("guidance_every", "guidance_from", "guidance_until"):
            raise ValueError(f"unknown shortcut {name!r}; use guidance_every, guidance_from or guidance_until")
        found[name] = float(value)
    every = found.get("guidance_every", 1.0)
    start, end = found.get("guidance_from", 0.0), found.get("guidance_until", 1.0)
    if not every.is_integer() or every < 1:
        raise ValueError(f"guidance_every is {every:g}; it must be an integer of at least 1")
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"guidance_from is {start:g} and guidance_until is {end:g}; they must be within 0 to 1, in this order"
        )
    return Shortcuts(int(every), start, end)
