"""Shortcuts that a `quality` preset may ask for: guidance on a part of the steps, and its difference kept for the others.

A guided step costs two rows. The exact engine takes no shortcut; what is here changes pictures, and is taken only when asked for:

    guidance_every=N   the difference that guidance makes is computed at every N-th step and kept for those between, which then
                       cost one row: Castillo et al. 2023, arXiv:2312.12487; Lv et al. 2024, arXiv:2410.19355 (FasterCache)
    guidance_until=X   guidance on the first X (0..1) of the steps, the prompt alone on the rest: Kynkäänniemi et al. 2024,
                       arXiv:2404.07724, and Castillo et al.
    guidance_from=X    no guidance before X (0..1) of the steps: Kynkäänniemi et al.

Written as `guidance_every=2,guidance_until=0.8`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXACT", "Shortcuts", "parse_shortcuts"]


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """What is left out of the exact walk."""

    guidance_every: int = 1
    guidance_from: float = 0.0
    guidance_until: float = 1.0

    def is_guided(self, index: int, steps: int) -> bool:
        """Whether guidance applies at step `index` of `steps`."""
        return self.guidance_from * steps <= index < self.guidance_until * steps

    def needs_both_rows(self, index: int, steps: int) -> bool:
        """Whether the difference is computed at this step: at the first that is guided, and every N-th after it."""
        if not self.is_guided(index, steps):
            return False
        first = next(place for place in range(steps) if self.is_guided(place, steps))
        return (index - first) % self.guidance_every == 0


EXACT = Shortcuts()


def parse_shortcuts(text: str) -> Shortcuts:
    """`name=value` pairs with commas between; empty for the exact walk. Raises ValueError."""
    found: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = pair.partition("=")
        if name not in ("guidance_every", "guidance_from", "guidance_until"):
            raise ValueError(f"no such shortcut: {name!r}")
        found[name] = float(value)
    every = found.get("guidance_every", 1.0)
    start, end = found.get("guidance_from", 0.0), found.get("guidance_until", 1.0)
    if every != int(every) or every < 1:
        raise ValueError("guidance_every must be a whole number from 1")
    if not 0 <= start <= end <= 1:
        raise ValueError("guidance_from and guidance_until must be within 0..1, in this order")
    return Shortcuts(int(every), start, end)
