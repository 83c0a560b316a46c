"""The table of model families: class names, defaults, and the text encoder that reads the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import ModelError

__all__ = ["FAMILIES", "T5_ENCODERS", "Defaults", "family_of"]


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for the request fields that a client leaves out."""

    num_inference_steps: int
    guidance_scale: float
    strength: float  # image-to-image
    strength_inpainting: float
    strength_variation: float


# Prefixes of the pipeline class names of diffusers, and the values that OpenVINO GenAI uses for omitted options
# (measured).
FAMILIES: dict[str, tuple[str, Defaults]] = {
    "StableDiffusionXL": ("sdxl", Defaults(50, 5.0, 0.5, 0.9999, 0.5)),
    "StableDiffusion3": ("sd3", Defaults(28, 7.0, 0.6, 0.6, 0.6)),
    "StableDiffusion": ("stable-diffusion", Defaults(50, 7.5, 0.8, 1.0, 0.6)),
    "LatentConsistencyModel": ("lcm", Defaults(4, 8.5, 0.8, 1.0, 0.6)),
    "Flux": ("flux", Defaults(28, 3.5, 0.6, 0.6, 0.6)),
}

# Families whose last text encoder is a T5, which reads the whole prompt (the CLIP encoders read only its beginning):
# the component's directory and the number of tokens that OpenVINO GenAI passes to it.
T5_ENCODERS: dict[str, tuple[str, int]] = {"sd3": ("text_encoder_3", 256), "flux": ("text_encoder_2", 512)}


def family_of(class_name: str, directory: Path) -> tuple[str, Defaults]:
    """Return the family name and the defaults for a pipeline class. Raises ModelError for an unsupported class."""
    for stem, found in FAMILIES.items():
        if class_name.startswith(stem):
            return found
    raise ModelError(
        f"{directory}: model_index.json has _class_name {class_name!r}; supported are classes that begin with "
        f"{', '.join(FAMILIES)}"
    )
