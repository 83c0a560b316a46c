"""The worlds that a built-in model can be trained for: what is drawn, how it is described, and the sizes of the model.

`shapes` draws figures in plain colours; `things` draws things that people know. The stages of the training take all
that differs between them from here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scripts.builtin_model import captions, scenes, thing_captions, thing_scenes
from scripts.builtin_model.textures import sample_texture
from scripts.builtin_model.thing_judge import Judge, parts_of
from scripts.builtin_model.thing_pictures import load_sprites
from tests.reader import read_picture

__all__ = [
    "SPRITES_FILE",
    "WORLD_NAMES",
    "ModelSizes",
    "ShapesWorld",
    "ThingsWorld",
    "World",
    "load_world",
    "model_sizes",
]

Pixels = npt.NDArray[np.uint8]
WORLD_NAMES = ("shapes", "things")
SPRITES_FILE = "things.png"  # in the folder of a training: the drawings of the things


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What decides the shapes of a world's weights.

    Attributes:
        latent_channels: channels of the autoencoder's latents.
        window: tokens of a prompt, the two special ones included.
        words: every word with its own token, sorted.
        time_scale: part of the noise schedule that is used: see `denoiser.schedule`.
    """

    latent_channels: int
    window: int
    words: tuple[str, ...]
    time_scale: float = 1.0


def model_sizes(name: str) -> ModelSizes:
    """Return the sizes of a world's model.

    Raises:
        KeyError: the name is not in WORLD_NAMES.
    """
    return {
        "shapes": ModelSizes(4, 32, tuple(captions.known_words())),
        "things": ModelSizes(8, 77, tuple(thing_captions.known_words()), time_scale=0.6),
    }[name]


class World(Protocol):
    """What a training has to know of a world.

    Attributes:
        sizes: the sizes of the model.
        latent_noise: largest standard deviation of the noise on latents when the decoder is trained.
        prompts: prompts of the contact sheets during the training.
    """

    sizes: ModelSizes
    latent_noise: float
    prompts: Sequence[str]

    def sample(self, rng: random.Random) -> Any:
        """Return a random composition."""

    def sample_edited(self, rng: random.Random) -> Any:
        """Return a random composition for a picture that is made from another one."""

    def sample_picture(self, rng: random.Random) -> Pixels:
        """Return a picture of a composition for the autoencoder: uint8 (256, 256, 3), RGB."""

    def sample_texture(self, rng: random.Random) -> Pixels:
        """Return another picture for the autoencoder: uint8 (256, 256, 3), RGB."""

    def edit(self, composition: Any, rng: random.Random) -> Any:
        """Return a composition from which one edit makes this one."""

    def draw(self, composition: Any, rng: random.Random) -> Pixels:
        """Draw a composition in slightly varied colours: uint8 (256, 256, 3), RGB."""

    def caption(self, composition: Any, rng: random.Random, *, complete: bool = False) -> str:
        """Describe a composition."""

    def read_round_trips(self, compositions: Sequence[Any], before: Pixels, after: Pixels) -> dict[str, float]:
        """Return figures of what a reader finds after a round trip through the autoencoder."""


class ShapesWorld:
    """Figures in plain colours."""

    sizes = model_sizes("shapes")
    latent_noise = 0.15
    prompts = (
        "a red circle on a blue background",
        "a yellow star on a black background",
        "a green triangle on a white background",
        "a pink heart on a purple background",
        "two orange squares on a cyan background",
        "three white stars on a blue background",
        "a red square and a green circle on a white background",
        "a black cross on a yellow background",
        "a cyan ring on a red background",
        "a small blue diamond on a pink background",
        "a large white circle on a green background",
        "a purple square on an orange background",
        "blue background",
        "a green heart",
        "three black rings on a pink background",
        "a yellow circle on the left on a purple background",
    )
    # A round trip loses small figures first, so kinds with small figures get a larger share than in the scenes.
    _kinds = {"one": 0.4, "two": 0.15, "three": 0.25, "pair": 0.2}  # noqa: RUF012  never changed

    def sample(self, rng: random.Random) -> scenes.Composition:
        """Return a random composition."""
        return scenes.sample_composition(rng)

    def sample_edited(self, rng: random.Random) -> scenes.Composition:
        """Return a random composition."""
        return scenes.sample_composition(rng)

    def sample_picture(self, rng: random.Random) -> Pixels:
        """Return a picture of a composition for the autoencoder."""
        kind = rng.choices(list(self._kinds), list(self._kinds.values()))[0]
        return scenes.draw_composition(scenes.sample_composition(rng, kind), rng)

    def sample_texture(self, rng: random.Random) -> Pixels:
        """Return a texture."""
        return sample_texture(rng)

    def edit(self, composition: scenes.Composition, rng: random.Random) -> scenes.Composition:
        """Return a composition from which one edit makes this one."""
        return scenes.sample_edit(composition, rng)

    def draw(self, composition: scenes.Composition, rng: random.Random) -> Pixels:
        """Draw a composition in slightly varied colours."""
        return scenes.draw_composition(composition, rng)

    def caption(self, composition: scenes.Composition, rng: random.Random, *, complete: bool = False) -> str:
        """Describe a composition."""
        return captions.caption(composition, rng, complete=complete)

    def read_round_trips(
        self, compositions: Sequence[scenes.Composition], before: Pixels, after: Pixels
    ) -> dict[str, float]:
        """Return what the reader of shapes finds.

        These are the parts (0..1) of scenes with the right background and count, and in scenes with the right count the
        parts of objects with the right colour and shape, and their mean similarity to the shape.
        """
        right = dict.fromkeys(("background", "count", "colour", "shape", "similarity"), 0.0)
        objects = 0
        for composition, drawn, decoded in zip(compositions, before, after, strict=True):
            truth, seen = read_picture(drawn), read_picture(decoded)
            right["background"] += seen.background == composition.background
            if len(seen.objects) != len(truth.objects):
                continue
            right["count"] += 1
            for was, now in zip(truth.objects, seen.objects, strict=True):
                objects += 1
                right["colour"] += now.colour == was.colour
                right["shape"] += now.shape == was.shape
                right["similarity"] += now.similarity
        counts = {"background": len(compositions), "count": len(compositions)}
        return {name: value / counts.get(name, max(1, objects)) for name, value in right.items()}


class ThingsWorld:
    """Things that people know.

    Args:
        sprites: their drawings.
    """

    sizes = model_sizes("things")
    latent_noise = 0.3
    prompts = (
        "a cat on a blue background",
        "a dog on a yellow background",
        "a panda on a green background",
        "an apple on a white background",
        "a pizza on a red background",
        "a sunflower in a meadow",
        "a car at the beach",
        "an owl at night",
        "a small rocket on a black background",
        "a large strawberry on a pink background",
        "a cat and a dog on a white background",
        "an apple and a banana on a blue background",
        "a frog, a star and a heart on a cyan background",
        "an empty meadow",
        "purple background",
        "a house on the left on a cyan background",
        "a puppy",
        "a robot on an orange background",
        "a rainbow on a grey background",
        "a butterfly at the top on a green background",
        "a castle at night",
        "a penguin at the beach",
        "a tulip on a brown background",
        "a hamburger on a cyan background",
    )

    def __init__(self, sprites: thing_scenes.Sprites) -> None:
        self.sprites = sprites
        self._judge = Judge(sprites)

    def sample(self, rng: random.Random) -> thing_scenes.Composition:
        """Return a random composition."""
        return thing_scenes.sample_composition(rng)

    def sample_edited(self, rng: random.Random) -> thing_scenes.Composition:
        """Return a random composition with its thing at any place more often."""
        return thing_scenes.sample_composition(rng, is_edited=True)

    def sample_picture(self, rng: random.Random) -> Pixels:
        """Return a picture of a composition for the autoencoder: half of them as before an edit, off the grid."""
        composition = thing_scenes.sample_composition(rng, rng.choice(["one", "pair", "three"]))
        if rng.random() < 0.5:
            composition = thing_scenes.sample_edit(composition, rng)
        return thing_scenes.draw_composition(composition, self.sprites, rng)

    def sample_texture(self, rng: random.Random) -> Pixels:
        """Return a texture."""
        return sample_texture(rng)

    def edit(self, composition: thing_scenes.Composition, rng: random.Random) -> thing_scenes.Composition:
        """Return a composition from which one edit makes this one."""
        return thing_scenes.sample_edit(composition, rng)

    def draw(self, composition: thing_scenes.Composition, rng: random.Random) -> Pixels:
        """Draw a composition in slightly varied colours."""
        return thing_scenes.draw_composition(composition, self.sprites, rng)

    def caption(self, composition: thing_scenes.Composition, rng: random.Random, *, complete: bool = False) -> str:
        """Describe a composition."""
        return thing_captions.caption(composition, rng, complete=complete)

    def read_round_trips(
        self, compositions: Sequence[thing_scenes.Composition], before: Pixels, after: Pixels
    ) -> dict[str, float]:
        """Return the parts (0..1) of scenes with the right background, and of things that are read as before."""
        right = {"background": 0.0, "thing": 0.0}
        things = 0
        for composition, drawn, decoded in zip(compositions, before, after, strict=True):
            right["background"] += self._judge.read_background(decoded) == composition.background
            for columns in parts_of(len(composition.things)):
                truth, seen = self._judge.read_thing(drawn, columns), self._judge.read_thing(decoded, columns)
                things += truth is not None
                right["thing"] += truth is not None and seen is not None and seen.name == truth.name
        return {"background": right["background"] / len(compositions), "thing": right["thing"] / max(1, things)}


def load_world(name: str, folder: Path) -> World:
    """Return a world.

    Args:
        name: one of WORLD_NAMES.
        folder: the folder of the training; `things` reads its drawings there.

    Raises:
        KeyError: another name.
        FileNotFoundError: the drawings are missing in the folder.
    """
    if name == "shapes":
        return ShapesWorld()
    if name == "things":
        return ThingsWorld(load_sprites(folder / SPRITES_FILE))
    raise KeyError(name)
