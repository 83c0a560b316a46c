"""The state of one picture between its denoiser calls, from the first latents to the last.

Invariant: the order of random draws, and of every product and sum, is that of OpenVINO GenAI 2026.4 for one picture
alone. So a picture does not depend on the pictures it shares calls with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ovserve.engines.families.protocol import Guidance, Start
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.schedulers import History, Plan
from ovserve.engines.stepwise.shortcuts import EXACT, Shortcuts
from ovserve.errors import InternalError

__all__ = ["Picture"]


@dataclass(slots=True, eq=False)
class Picture:
    """One picture in flight. Owned by the device thread.

    Attributes:
        index: steps done.
        predictions: of the rows of the step in flight, by condition, as their calls end.
        guidance: how the guidance scale acts.
        difference: what guidance kept of the predictions when both rows were last computed.
        difference_at: the step of that.
        computed: the last two guided predictions of the denoiser with their timesteps, the newest last.
        overtakes: steps of shorter pictures since its own last step.
        is_solo: it shares no call.
        is_ended: it failed; results of its calls in flight are dropped.
    """

    work: Work
    plan: Plan
    guidance: Guidance
    start: Start | None = None
    index: int = 0
    latents: Array = field(default_factory=lambda: np.zeros((1, 1, 1, 1), f32))
    decoded: Array | None = None
    clean: Array | None = None
    history: History = ()
    predictions: dict[int, Array] = field(default_factory=dict)
    difference: Array | None = None
    difference_at: int | None = None
    computed: tuple[tuple[float, Array], ...] = ()
    shortcuts: Shortcuts = EXACT
    overtakes: int = 0
    is_solo: bool = False
    is_ended: bool = False

    @property
    def steps(self) -> int:
        """Number of denoiser steps in total."""
        return len(self.plan.timesteps)

    @property
    def is_done(self) -> bool:
        """Whether only decoding is left."""
        return self.index == self.steps

    @property
    def conditions(self) -> tuple[int, ...]:
        """Which rows of the conditions the next step needs: all, or the last one, which has the prompt."""
        rows = self.ready.conditions.rows
        if rows == 1 or self.shortcuts.needs_both_rows(self.index, self.steps, self.difference_at):
            return tuple(range(rows))
        return (rows - 1,)

    @property
    def is_forecast(self) -> bool:
        """Whether the next step needs no denoiser call: its prediction follows from earlier ones.

        Never where the scheduler adds noise at each step: the predictions then lie on no line.
        """
        if len(self.computed) < 2 or self.is_done or self.plan.draws_noise(self.index):
            return False
        return not self.shortcuts.needs_denoiser(self.index, self.steps)

    @property
    def rows(self) -> int:
        """Rows in the next denoiser call."""
        return len(self.conditions)

    @property
    def ready(self) -> Start:
        """`start`, which is set once the picture is encoded."""
        if self.start is None:
            raise ValueError("the picture is not encoded yet")
        return self.start

    @property
    def timestep(self) -> float:
        """The training timestep of the next step."""
        return self.plan.timesteps[self.index]

    def begin(self, start: Start) -> None:
        """Store the result of encoding.

        Raises:
            InternalError: the first latents are not finite.
        """
        self.start, self.latents = start, start.latents
        _check_finite("encoding", self.latents)

    def sample(self) -> Array:
        """Return the latents, scaled for the next step: float32 (1, C, h, w)."""
        return self.plan.scale_input(self.latents, self.index)

    def advance(self) -> None:
        """Make one step, with the predictions of all rows or with a forecast.

        Raises:
            InternalError: its latents are not finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):  # the check below reports it
            self._advance()
        # The plan's result for decoding is checked where it is used: after the last step.
        results = (self.latents, self.decoded) if self.is_done else (self.latents,)
        _check_finite(f"step {self.index} of {self.steps}", *results)

    def _advance(self) -> None:
        ready, index = self.ready, self.index
        prediction = self._forecast() if self.is_forecast else self._guided()
        self.predictions = {}
        self.overtakes = 0
        noise = ready.draw(self.latents.shape) if self.plan.draws_noise(index) else None
        found = self.plan.step(prediction, self.latents, index, self.history, noise)
        self.index, self.history = index + 1, found.history
        self.latents, self.clean = found.latents, found.clean
        if ready.blend is not None:
            self.latents = ready.blend.at(self.plan, found.latents, self.index)
            self.clean = ready.blend.over(ready.blend.image, found.clean)
        # The library does not blend latents that a scheduler returns for decoding; the kept part is pasted in pixels.
        self.decoded = self.latents if found.decoded is None else found.decoded

    def _forecast(self) -> Array:
        """Return the value at this timestep of the line through the last two predictions of the denoiser."""
        (before, first), (at, last) = self.computed
        slope = f32((self.timestep - at) / (at - before)) if at != before else f32(0)
        return last + slope * (last - first)

    def _guided(self) -> Array:
        """Return the prediction after guidance, and keep it for forecasts."""
        guided = self._combined()
        if self.shortcuts.denoise_every > 1:
            self.computed = (*self.computed[-1:], (self.timestep, guided))
        return guided

    def _combined(self) -> Array:
        """Return the prediction after guidance, with the difference of an earlier step if only one row was computed."""
        rows = self.predictions
        if len(rows) > 1:
            guided, self.difference = self.guidance.combine([rows[place] for place in sorted(rows)], self.work)
            self.difference_at = self.index
            return guided
        (prediction,) = rows.values()
        if self.difference is not None and self.shortcuts.is_guided(self.index, self.steps):
            return self.guidance.reuse(prediction, self.difference, self.work)
        return prediction


def _check_finite(stage: str, *arrays: Array | None) -> None:
    """Check that latents have no infinity and no NaN: the VAE would make a black picture of them.

    Raises:
        InternalError: they have; `stage` says after what.
    """
    for array in arrays:
        if array is not None and not np.isfinite(array).all():
            raise InternalError(
                f"the latents are not finite after {stage}: the model overflows; "
                "set INFERENCE_PRECISION_HINT to f32 in plugin_config, or use a lower guidance_scale"
            )
