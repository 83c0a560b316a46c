"""What the families with a flow-matching transformer share: how a picture starts, its schedule, feeds for measuring.

A family's module adds the text side, the guidance and the layout of the latents (`flux`, `flux2`, `sd3`, `z_image`,
`qwen_image`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.families.blend import Blend, latent_mask
from ovserve.engines.families.configs import component_config, number
from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.packing import PATCH, grid, pack, unpack
from ovserve.engines.families.protocol import (
    Conditions,
    Context,
    DenoiserRow,
    Encode,
    Feed,
    Feeds,
    Guidance,
    PlanMaker,
    Source,
    Start,
    Types,
)
from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.families.vae import sample
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.schedulers.flow import FlowScheduler, Shift, shift_linear
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.schedulers.plans import Plan
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["PackedTransformer", "TransformerFamily", "run_transformer"]


class TransformerFamily:
    """A family with a flow-matching transformer.

    Raises:
        ModelError: transformer/config.json cannot be read.
    """

    denoiser = "transformer"
    inputs: frozenset[str] = frozenset()
    required_inputs: tuple[str, ...] = ()
    vae_overflows_float16 = False
    texts: tuple[TextEncoder, ...] = ()
    main_text = 0
    patch_channels = PATCH**2  # channels of the denoiser's sample for each latent channel
    shift: Shift = staticmethod(shift_linear)

    def __init__(self, profile: ModelProfile) -> None:
        self.config = component_config(profile.directory / self.denoiser)
        self.channels = int(number(self.config, "in_channels", 64))
        self.profile = profile
        self.guidance: Guidance = RowGuidance()

    def check_channels(self, latent_channels: int) -> None:
        """Check that the transformer takes the VAE's latents.

        Raises:
            ModelError: it takes another number of channels.
        """
        expected = self.expected_channels(latent_channels)
        if self.channels != expected:
            raise ModelError(f"transformer: in_channels is {self.channels}; expected {expected} with this VAE")

    def expected_channels(self, latent_channels: int) -> int:
        """Return the channels of the denoiser's sample with a VAE of so many channels."""
        return latent_channels * self.patch_channels

    def schedulers(self, document: Mapping[str, Any], class_name: str) -> tuple[str, dict[str, PlanMaker]]:  # noqa: ARG002
        """Return the model's scheduler: the only one that fits flow matching.

        Raises:
            ModelError: its configuration is not supported.
        """
        return "", {"": FlowScheduler(document, self.shift)}

    # --- starting ---

    def conditions(self, work: Work, embed: Encode) -> Conditions:
        """Return the conditions of a picture."""
        raise NotImplementedError

    def start(self, work: Work, plan: Plan, source: Source) -> Start:
        """Start from noise or from the image; a mask without a channel for it is kept by blending after each step."""
        conditions = self.conditions(work, source.embed)
        image, noise = self.draw_start(work, source)
        latents = noise if image is None else plan.add_noise(image, noise, 0)
        blend = self.blend_of(work, image, noise, source)
        return Start(conditions, latents, source.draw, blend, Context(layout=self.layout_of(conditions)))

    def blend_of(self, work: Work, image: Array | None, noise: Array, source: Source) -> Blend | None:
        """Return what keeps the part outside the mask; None without a mask."""
        if work.mask_image is None or image is None:
            return None
        return Blend(latent_mask(work.mask_image, source.vae.scale), image, noise)

    def layout_of(self, conditions: Conditions) -> Hashable:
        """Return what must be equal in the conditions of pictures that share a call: the shapes of a row."""
        return tuple((name, array.shape[1:]) for name, array in sorted(conditions.arrays.items()))

    def draw_start(self, work: Work, source: Source) -> tuple[Array | None, Array]:
        """Return the image's latents, if there is an image, and noise; draws in the library's order: image, noise."""
        image = None if work.initial_image is None else self.encode(work.initial_image, source)
        return image, source.draw(self.noise_shape(work, source))

    def noise_shape(self, work: Work, source: Source) -> tuple[int, ...]:
        """Return the shape of a picture's latents."""
        vae = source.vae
        return (1, vae.latent_channels, work.height // vae.scale, work.width // vae.scale)

    def encode(self, image: Pixels, source: Source) -> Array:
        """Return latents drawn from the posterior of an image."""
        return sample(source.moments(image, None), source.draw, source.vae)

    def decoder_input(self, latents: Array) -> Array:
        """Return the latents: the decoder's preprocessing scales them."""
        return latents

    # --- calls ---

    def feed(self, rows: Sequence[DenoiserRow], types: Types, *, timestep_per_row: bool) -> Feed:
        """Return the inputs of one call: conditions, latents, timesteps, and positions."""
        feed: Feed = {
            name: np.stack([row.conditions.arrays[name][row.index] for row in rows])
            for name in types
            if name in rows[0].conditions.arrays
        }
        feed["hidden_states"] = np.concatenate([self.sample_of(row) for row in rows])
        timesteps = [self.timestep_of(f32(row.timestep)) for row in (rows if timestep_per_row else rows[:1])]
        feed["timestep"] = np.array(timesteps, types["timestep"])
        return feed | self.positions(rows)

    def sample_of(self, row: DenoiserRow) -> Array:
        """Return the denoiser's sample of a row."""
        return row.sample

    def timestep_of(self, timestep: np.float32) -> np.float32:
        """Return a training timestep as the denoiser takes it."""
        return f32(timestep / f32(1000))

    def positions(self, rows: Sequence[DenoiserRow]) -> Feed:  # noqa: ARG002
        """Return the inputs that hold the positions of tokens."""
        return {}

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the transformer and return the predictions, (rows, C, h, w)."""
        raise NotImplementedError

    def sharing_key(self, latents: Array, start: Start, timestep: float, *, timestep_per_row: bool) -> Hashable:
        """Return the size of the latents, the layout of the context, and a timestep that all rows have."""
        key = (latents.shape, start.context.layout)
        return key if timestep_per_row else (*key, timestep)

    # --- measuring ---

    def probe_conditions(self, tokens: int, random: np.random.Generator) -> Conditions:
        """Return random conditions of one row with so many text tokens."""
        raise NotImplementedError

    def feeds(
        self,
        shapes: Mapping[str, tuple[int, ...]],  # noqa: ARG002
        types: Types,
        cells: tuple[int, int],
        tokens: int,
    ) -> Feeds:
        """Return inputs for measuring: noise of the native size, and as many tokens as the window has."""
        return _ProbeFeeds(self, types, cells, tokens)

    def latent_channels(self) -> int:
        """Return the channels of the latents."""
        return self.channels // self.patch_channels

    def probe_row(self, index: int, cells: tuple[int, int], tokens: int) -> DenoiserRow:
        """Return row `index` of a call for measuring: always the same."""
        random = np.random.default_rng(index)
        latents = random.standard_normal((1, self.latent_channels(), *cells), np.float32)
        # Timesteps differ between rows: a row compared with itself alone then shows whether the graph uses them.
        timestep = float((500 + 137 * index) % 1000)
        return DenoiserRow(latents, timestep, self.probe_conditions(tokens, random), 0, self.probe_context(cells))

    def probe_context(self, cells: tuple[int, int]) -> Context:  # noqa: ARG002
        """Return the context of a row for measuring."""
        return Context()


class PackedTransformer(TransformerFamily):
    """A transformer that takes packed latents, with reference images as further tokens behind them."""

    position_axes = 3

    def sample_of(self, row: DenoiserRow) -> Array:
        """Return the tokens of a row: latents, additional channels of each token, then the tokens of references."""
        tokens, context = pack(row.sample), row.context
        if context.channels is not None:
            tokens = np.concatenate([tokens, context.channels], axis=2)
        return tokens if context.tokens is None else np.concatenate([tokens, context.tokens], axis=1)

    def image_positions(self, row: DenoiserRow) -> Array:
        """Return the positions of a row's tokens: (S, axes)."""
        own = grid(0, row.sample.shape[2] // PATCH, row.sample.shape[3] // PATCH, self.position_axes)
        found = row.context.positions
        return own if found is None else np.concatenate([own, found[0]])

    def run(self, request: Any, feed: Feed) -> Array:
        """Run the transformer and return the predictions of the picture's own tokens, unpacked."""
        positions = feed["img_ids"].reshape(-1, feed["img_ids"].shape[-2], self.position_axes)[0]
        own = positions[positions[:, 0] == 0]
        height, width = (int(side) + 1 for side in own[-1, 1:3])
        return unpack(run_transformer(request, feed)[:, : len(own)], height * PATCH, width * PATCH)


def run_transformer(request: Any, feed: Mapping[str, NDArray[Any]]) -> Array:
    """Run a transformer and return a copy of its output.

    Raises:
        RuntimeError: the call failed, or its output has another number of rows.
    """
    request.infer(dict(feed), share_inputs=True)
    found = np.array(request.get_output_tensor(0).data)
    rows = len(feed["hidden_states"])
    if len(found) != rows:
        raise RuntimeError(f"the transformer returned {len(found)} rows for {rows}")
    return found


class _ProbeFeeds:
    """Inputs for measuring, made by the family's own `feed`; the protocol `Feeds`."""

    def __init__(self, family: TransformerFamily, types: Types, cells: tuple[int, int], tokens: int) -> None:
        self._family = family
        self._types = types
        self._cells = cells
        self._tokens = tokens

    def of(self, rows: int, *, timestep_per_row: bool = True) -> Feed:
        """Return inputs with `rows` rows; row i is the same for every value of `rows`."""
        return self._feed([self._row(index) for index in range(rows)], timestep_per_row=timestep_per_row)

    def second(self, *, timestep_per_row: bool = True) -> Feed:
        """Return the second row of `of(2)` alone."""
        feed = self._feed([self._row(1)], timestep_per_row=True)
        if timestep_per_row:
            return feed
        return feed | {"timestep": self._feed([self._row(0)], timestep_per_row=True)["timestep"]}

    def quarter(self) -> tuple[Feeds, int]:
        """Return feeds of half the width and height, and the ratio of the areas, 4; itself and 1 for odd patches."""
        height, width = self._cells
        if height % (2 * PATCH) or width % (2 * PATCH):
            return self, 1
        return _ProbeFeeds(self._family, self._types, (height // 2, width // 2), self._tokens), 4

    def _row(self, index: int) -> DenoiserRow:
        return self._family.probe_row(index, self._cells, self._tokens)

    def _feed(self, rows: list[DenoiserRow], *, timestep_per_row: bool) -> Feed:
        return self._family.feed(rows, self._types, timestep_per_row=timestep_per_row)
