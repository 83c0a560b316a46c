"""The table of model families: class names, defaults, and the text encoder that reads the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import ModelError

__all__ = ["FAMILIES", "T5_ENCODERS", "Defaults", "family_of"]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that leaves the field out."""

    num_inference_steps: int
    guidance_scale: float
    strength: float  # image-to-image
    strength_inpainting: float
    strength_variation: float


# Class-name stems as diffusers writes them, and what OpenVINO GenAI does with an omitted option for each (measured).
FAMILIES: dict[str, tuple[str, Defaults]] = {
    "StableDiffusionXL": ("sdxl", Defaults(50, 5.0, 0.5, 0.9999, 0.5)),
    "StableDiffusion3": ("sd3", Defaults(28, 7.0, 0.6, 0.6, 0.6)),
    "StableDiffusion": ("stable-diffusion", Defaults(50, 7.5, 0.8, 1.0, 0.6)),
    "LatentConsistencyModel": ("lcm", Defaults(4, 8.5, 0.8, 1.0, 0.6)),
    "Flux": ("flux", Defaults(28, 3.5, 0.6, 0.6, 0.6)),
}

# Families whose last text encoder is a T5, which reads the whole prompt (the CLIP encoders beside it read the beginning), and
# the tokens the library gives it.
T5_ENCODERS: dict[str, tuple[str, int]] = {"sd3": ("text_encoder_3", 256), "flux": ("text_encoder_2", 512)}


def family_of(class_name: str, directory: Path) -> tuple[str, Defaults]:
    for stem, found in FAMILIES.items():
        if class_name.startswith(stem):
            return found
    raise ModelError(
        f"{directory}: model_index.json names the class {class_name!r}, which is not an image pipeline ovserve serves"
    )
