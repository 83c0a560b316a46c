"""The table of model families: what the front end and the engines know of one without reading a model's files.

No other module compares a family's name: what depends on the family is a field of its row here, or a method of its
module in `engines.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import ModelError

__all__ = ["FAMILIES", "LCM_SCHEDULER", "Defaults", "FamilyTraits", "T5Encoder", "family_of"]

LCM_SCHEDULER = "lcm"  # the scheduler that models of the family LCM are distilled for; others can name it too


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for the request fields that a client leaves out."""

    num_inference_steps: int
    guidance_scale: float
    strength: float  # image-to-image
    strength_inpainting: float
    strength_variation: float


@dataclass(frozen=True, slots=True)
class T5Encoder:
    """A family's last text encoder if it is a T5: it reads the whole prompt, CLIP's encoders only its beginning.

    Attributes:
        number: which text encoder it is, from 1.
        tokens: the number of tokens that OpenVINO GenAI passes to it.
    """

    number: int
    tokens: int

    @property
    def encoder(self) -> str:
        """Directory of the encoder."""
        return f"text_encoder_{self.number}"

    @property
    def tokenizer(self) -> str:
        """Directory of its tokenizer."""
        return f"tokenizer_{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyTraits:
    """One row of the table.

    Attributes:
        class_stem: what the pipeline class names of diffusers begin with.
        defaults: the values that OpenVINO GenAI uses for omitted options (measured).
        takes_negative_prompt: whether a negative prompt has any effect (classifier-free guidance).
        takes_schedulers: whether other schedulers than the model's own can run it.
        t5: the T5 encoder, or None.
        rounds_steps_up: an edit runs its steps times its strength rounded up. Flow matching cuts the number of steps
            that are left out to an integer; the other families cut the number that runs.
        fixes_guidance: OpenVINO GenAI fixes with a model's first picture whether there is guidance.
    """

    class_stem: str
    defaults: Defaults
    takes_negative_prompt: bool = False
    takes_schedulers: bool = False
    t5: T5Encoder | None = None
    rounds_steps_up: bool = False
    fixes_guidance: bool = False


# In the order in which class names are compared: a stem may begin with another one.
FAMILIES: Mapping[str, FamilyTraits] = {
    "sdxl": FamilyTraits(
        class_stem="StableDiffusionXL",
        defaults=Defaults(50, 5.0, 0.5, 0.9999, 0.5),
        takes_negative_prompt=True,
        takes_schedulers=True,
    ),
    "sd3": FamilyTraits(
        class_stem="StableDiffusion3",
        defaults=Defaults(28, 7.0, 0.6, 0.6, 0.6),
        takes_negative_prompt=True,
        t5=T5Encoder(3, 256),
        rounds_steps_up=True,
        fixes_guidance=True,
    ),
    "stable-diffusion": FamilyTraits(
        class_stem="StableDiffusion",
        defaults=Defaults(50, 7.5, 0.8, 1.0, 0.6),
        takes_negative_prompt=True,
        takes_schedulers=True,
    ),
    "lcm": FamilyTraits(
        class_stem="LatentConsistencyModel",
        defaults=Defaults(4, 8.5, 0.8, 1.0, 0.6),
    ),
    "flux": FamilyTraits(
        class_stem="Flux",
        defaults=Defaults(28, 3.5, 0.6, 0.6, 0.6),
        t5=T5Encoder(2, 512),
        rounds_steps_up=True,
    ),
}


def family_of(class_name: str, directory: Path) -> str:
    """Return the name of the family of a pipeline class. Raises ModelError for an unsupported class."""
    for name, traits in FAMILIES.items():
        if class_name.startswith(traits.class_stem):
            return name
    raise ModelError(
        f"{directory}: model_index.json has _class_name {class_name!r}; supported are classes that begin with "
        f"{', '.join(traits.class_stem for traits in FAMILIES.values())}"
    )
