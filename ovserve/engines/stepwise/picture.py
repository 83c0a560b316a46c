"""The state of one picture between its UNet calls, from the first latents to the last.

Invariant: the order of random draws, and of every product and sum, is that of OpenVINO GenAI 2026.4 for one picture
alone. So a picture does not depend on the pictures it shares calls with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ovserve.engines.families.protocol import Conditions, Guidance
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.schedulers import History, Plan
from ovserve.engines.stepwise.shortcuts import EXACT, Shortcuts
from ovserve.errors import InternalError

__all__ = ["Blend", "Draw", "Picture", "Start", "latent_mask"]

Draw = Callable[[tuple[int, ...]], Array]  # returns standard normal noise of a shape: the next of one seed's stream


@dataclass(frozen=True, slots=True)
class Blend:
    """Inpainting with a UNet that takes no mask: after each step the kept part is restored at that step's noise level.

    As in Avrahami et al. 2023, arXiv:2206.02779, section 3.2. All float32 (1, C, h, w); `mask` (1, 1, h, w):
    1 = repaint.
    """

    mask: Array
    image: Array
    noise: Array

    def at(self, plan: Plan, latents: Array, index: int) -> Array:
        """Return `latents` with the kept part at the noise level of step `index`, or clean after the last step."""
        kept = self.image
        if index < len(plan.timesteps):
            kept = plan.add_noise(self.image, self.noise, index)
        return self.over(kept, latents)

    def over(self, kept: Array, latents: Array) -> Array:
        """Return `latents` where the mask is 1, and `kept` elsewhere."""
        mixed: Array = (f32(1) - self.mask) * kept + self.mask * latents
        return mixed


@dataclass(frozen=True, slots=True)
class Start:
    """The result of encoding: the conditions, the first latents, and the data for inpainting.

    Attributes:
        draw: the seed's stream of noise, after what encoding drew from it.
        blend: for inpainting with a UNet that takes no mask; else None.
        latents: float32 (1, C, h, w), at the noise level of the first step.
        extra_channels: mask and masked image of an inpainting UNet, float32 (1, 1 + C, h, w); else None.
    """

    conditions: Conditions
    latents: Array
    draw: Draw
    blend: Blend | None = None
    extra_channels: Array | None = None


@dataclass(slots=True, eq=False)
class Picture:
    """One picture in flight. Owned by the device thread.

    Attributes:
        index: steps done.
        predictions: of the rows of the step in flight, by condition, as their calls end.
        guidance: how the guidance scale acts.
        difference: what guidance kept of the predictions when both rows were last computed.
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
    shortcuts: Shortcuts = EXACT
    overtakes: int = 0
    is_solo: bool = False
    is_ended: bool = False

    @property
    def steps(self) -> int:
        """Number of UNet steps in total."""
        return len(self.plan.timesteps)

    @property
    def is_done(self) -> bool:
        """Whether only decoding is left."""
        return self.index == self.steps

    @property
    def conditions(self) -> tuple[int, ...]:
        """Which rows of the conditions the next step needs: 0 and 1 (without and with the prompt), or one of them."""
        if self.ready.conditions.rows == 1:
            return (0,)
        return (0, 1) if self.shortcuts.needs_both_rows(self.index, self.steps) else (1,)

    @property
    def rows(self) -> int:
        """Rows in the next UNet call."""
        return len(self.conditions)

    @property
    def ready(self) -> Start:
        """`start`, which is set once the picture is encoded."""
        if self.start is None:
            raise ValueError("the picture is not encoded yet")
        return self.start

    @property
    def timestep(self) -> int:
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
        """Return the UNet's `sample` for each row of the next step: float32 (1, channels, h, w)."""
        scaled = self.plan.scale_input(self.latents, self.index)
        extra = self.ready.extra_channels
        return scaled if extra is None else np.concatenate([scaled, extra], axis=1)

    def advance(self) -> None:
        """Make one step with the predictions of all rows.

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
        prediction = self._guided()
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

    def _guided(self) -> Array:
        """Return the prediction after guidance, with the difference of an earlier step if only one row was computed."""
        rows, scale = self.predictions, self.work.guidance_scale
        if len(rows) == 2:
            guided, self.difference = self.guidance.combine(rows[0], rows[1], scale)
            return guided
        (prediction,) = rows.values()
        if self.difference is not None and self.shortcuts.is_guided(self.index, self.steps):
            return self.guidance.reuse(prediction, self.difference, scale)
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


def latent_mask(mask_image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], scale: int) -> Array:
    """Return a mask uint8 (H, W) on the latent grid: float32 (1, 1, h, w), 1 = repaint.

    As in the library: threshold at one half, then the first pixel of each cell. Masks are pooled before, so all pixels
    of a cell are equal.
    """
    cells = (mask_image[::scale, ::scale] >= 128).astype(f32)
    return cells[None, None]
