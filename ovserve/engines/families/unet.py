"""What the families with a UNet share: its inputs and channels, its schedulers, and how a picture starts."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.families.blend import Blend, latent_mask
from ovserve.engines.families.configs import component_config, number
from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.lcm import EmbeddedGuidance
from ovserve.engines.families.protocol import (
    Conditions,
    Context,
    DenoiserRow,
    Encode,
    Feed,
    Guidance,
    PlanMaker,
    Source,
    Start,
    Types,
)
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.vae import sample
from ovserve.engines.protocol import CLIP_WINDOW, Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import Plan
from ovserve.engines.schedulers.schedulers import SCHEDULERS, Scheduler, scheduler_name
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["UnetFamily", "UnetFeeds", "run_unet"]

log = logging.getLogger(__name__)


class UnetFamily:
    """A family with a UNet; `stable_diffusion` and `sdxl` add their text sides.

    Raises:
        ModelError: unet/config.json cannot be read.
    """

    denoiser = "unet"
    inputs = frozenset({"sample", "timestep", "encoder_hidden_states", "timestep_cond", "text_embeds", "time_ids"})
    required_inputs: tuple[str, ...] = ("sample", "timestep", "encoder_hidden_states")
    vae_overflows_float16 = False
    main_text = 0

    def __init__(self, profile: ModelProfile) -> None:
        config = component_config(profile.directory / self.denoiser)
        self.channels = int(number(config, "in_channels", 4))
        self.takes_mask = profile.inpainting_unet
        embedding = max(0, int(number(config, "time_cond_proj_dim", 0)))
        self.guidance: Guidance = EmbeddedGuidance(embedding) if embedding else RowGuidance()
        self.texts = tuple(
            self._text_encoder(profile.directory, suffix) for suffix in ("", "_2")[: profile.text_encoders]
        )

    def _text_encoder(self, directory: Path, suffix: str) -> TextEncoder:
        config = component_config(directory / f"text_encoder{suffix}")
        window = int(number(config, "max_position_embeddings", CLIP_WINDOW))
        return TextEncoder(f"text_encoder{suffix}", f"tokenizer{suffix}", window, self.embedding_outputs(config))

    def embedding_outputs(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return which outputs of a text encoder with this configuration make the embedding of a text."""
        raise NotImplementedError

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the conditions of a picture."""
        raise NotImplementedError

    def check_channels(self, latent_channels: int) -> None:
        """Check that the UNet takes latents, or latents, mask and masked image.

        Raises:
            ModelError: it takes another number of channels.
        """
        plain, masked = latent_channels, 2 * latent_channels + 1
        if self.channels not in (plain, masked):
            raise ModelError(f"unet: in_channels is {self.channels}; expected {plain}, or {masked} for inpainting")

    def schedulers(self, document: Mapping[str, Any], class_name: str) -> tuple[str, dict[str, PlanMaker]]:
        """Return the name of the model's own scheduler, and it with those that support its configuration.

        Raises:
            ModelError: the model's own scheduler, or its configuration, is not supported.
        """
        own = scheduler_name(document, class_name)
        offered: dict[str, PlanMaker] = {own: Scheduler(own, document)}
        for name in () if self.guidance.is_distilled else sorted(SCHEDULERS - {own}):
            try:
                offered[name] = Scheduler(name, document)
            except ModelError as error:
                log.debug("scheduler %s is not available: %s", name, error)
        return own, offered

    def feed(self, rows: Sequence[DenoiserRow], types: Types, *, timestep_per_row: bool) -> Feed:
        """Return the inputs of one call: latents, timesteps, and the conditions that this UNet takes."""
        feed: Feed = {
            name: np.stack([row.conditions.arrays[name][row.index] for row in rows])
            for name in types
            if name not in ("sample", "timestep")
        }
        feed["sample"] = np.concatenate([_sample(row) for row in rows])
        timesteps = [row.timestep for row in rows]
        feed["timestep"] = np.array(timesteps if timestep_per_row else timesteps[:1], types["timestep"])
        return feed

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the UNet; see `run_unet`."""
        return run_unet(request, feed)

    def start(self, work: Work, plan: Plan, source: Source) -> Start:
        """Start from noise or from the image, with random draws in the library's order: image, noise, masked image."""
        conditions = self.conditions(work, source.embed)
        vae, draw = source.vae, source.draw
        is_masked = work.mode == "inpainting"
        from_noise = work.mode == "text2image" or (is_masked and f32(work.strength) == 1)
        image: Array | None = None
        if work.initial_image is not None and not (from_noise and self.takes_mask):
            image = sample(source.moments(work.initial_image, None), draw, vae)
        noise = draw((1, vae.latent_channels, work.height // vae.scale, work.width // vae.scale))
        latents = noise * plan.init_sigma if from_noise or image is None else plan.add_noise(image, noise, 0)
        if not is_masked or work.mask_image is None or work.initial_image is None:
            return Start(conditions, latents, draw)
        mask = latent_mask(work.mask_image, vae.scale)
        if not self.takes_mask:
            return Start(conditions, latents, draw, blend=Blend(mask, image, noise) if image is not None else None)
        masked = sample(source.moments(work.initial_image, work.mask_image), draw, vae)
        return Start(conditions, latents, draw, context=Context(channels=np.concatenate([mask, masked], axis=1)))

    def decoder_input(self, latents: Array) -> Array:
        """Return the latents: the decoder's preprocessing scales them."""
        return latents

    def sharing_key(self, latents: Array, start: Start, timestep: float, *, timestep_per_row: bool) -> Hashable:  # noqa: ARG002
        """Return the size of the latents, and the timestep where a call takes one for all rows."""
        return latents.shape if timestep_per_row else (*latents.shape, timestep)

    def feeds(
        self, shapes: Mapping[str, tuple[int, ...]], types: Types, cells: tuple[int, int], tokens: int
    ) -> UnetFeeds:
        """Return inputs for measuring: noise of the native size, and as many tokens as the window has."""
        sizes = dict(shapes)
        sizes["sample"] = (self.channels, *cells)
        sizes["encoder_hidden_states"] = (tokens, sizes["encoder_hidden_states"][-1])
        return UnetFeeds(sizes, types)


def _sample(row: DenoiserRow) -> Array:
    """Return the UNet's sample of a row: latents and the additional channels."""
    channels = row.context.channels
    if channels is None:
        return row.sample
    return np.concatenate([row.sample, channels[row.index % len(channels)][None]], axis=1)


def run_unet(request: Any, feed: Mapping[str, NDArray[Any]]) -> Array:
    """Run the UNet and return a copy of its output: float32 (rows, C, H/8, W/8).

    Raises:
        RuntimeError: the call failed, or the UNet cannot work at this size.
    """
    first = _first_bytes(request)
    first[:] = _UNWRITTEN[: first.size]
    request.infer(dict(feed), share_inputs=True)
    is_written = not np.array_equal(_first_bytes(request), _UNWRITTEN)
    found = np.array(request.get_output_tensor(0).data)
    rows, _, height, width = feed["sample"].shape
    # Where the UNet cannot halve the sides often enough, the plugin silently keeps the output of the call before, here
    # and in the next calls with the shape that worked last.
    if not is_written or (len(found), *found.shape[2:]) != (rows, height, width):
        raise RuntimeError(f"the UNet cannot work on {height} x {width} latents")
    return found


_UNWRITTEN = np.array([0xAD, 0xDE, 0xC0, 0x7F], np.uint8)  # a NaN that no computation gives


def _first_bytes(request: Any) -> NDArray[np.uint8]:
    """Return the first bytes of the output; empty before the first call."""
    data: NDArray[Any] = request.get_output_tensor(0).data
    return data.reshape(-1).view(np.uint8)[: _UNWRITTEN.size]


class UnetFeeds:
    """UNet inputs for measuring; the protocol `Feeds`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], types: Types) -> None:
        self._shapes = shapes
        self._types = types

    def of(self, rows: int, *, timestep_per_row: bool = True) -> Feed:
        """Return inputs with `rows` rows of noise; row i is the same for every value of `rows`."""
        feed = {name: np.concatenate([self._row(name, index) for index in range(rows)]) for name in self._shapes}
        return feed if timestep_per_row else feed | {"timestep": self._row("timestep", 0)}

    def second(self, *, timestep_per_row: bool = True) -> Feed:
        """Return the second row of `of(2)` alone."""
        feed = {name: self._row(name, 1) for name in self._shapes}
        return feed if timestep_per_row else feed | {"timestep": self._row("timestep", 0)}

    def quarter(self) -> tuple[UnetFeeds, int]:
        """Return feeds of half the width and height, and the ratio of the areas, 4.

        If the UNet could not halve such sides often enough, return these feeds and 1.
        """
        channels, height, width = self._shapes["sample"]
        if height % 16 or width % 16:
            return self, 1
        return UnetFeeds(self._shapes | {"sample": (channels, height // 2, width // 2)}, self._types), 4

    def _row(self, name: str, index: int) -> NDArray[Any]:
        if name == "timestep":
            # Timesteps differ between rows: a row compared with itself alone then shows whether the graph uses them.
            return np.array([(500 + 137 * index) % 1000], self._types[name])
        noise: Array = np.random.default_rng((index, len(name))).standard_normal((1, *self._shapes[name]), np.float32)
        return noise.astype(self._types[name])
