"""The validated image request that the front end sends to a worker."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ovserve.errors import LinkGarbage
from ovserve.wire.blobs import Blob

__all__ = ["SEEDS", "ImageRequest"]

SEEDS = 2**32  # the library takes seeds modulo this number
# Preparing takes up to half a second for so many pixels of image and mask together, and 7 s for the largest.
_LIGHT_PIXELS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One validated request for `n` pictures. Picture k uses seed + k (mod 2**32).

    It travels as JSON in a spool segment, because a prompt alone may be larger than a message. `width` and `height` 0
    mean the size of the image. `images` is empty for text-to-image.
    """

    task: str  # edit, generation, variation
    prompt: str
    negative_prompt: str = ""
    prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_2: str = ""
    negative_prompt_3: str = ""
    images: tuple[Blob, ...] = ()
    mask: Blob | None = None
    mask_mode: str = "auto"  # auto, alpha, luminance, stencil, none
    mask_invert: bool = False
    mask_blur: int = 0  # pixels
    mask_fill: str = "original"  # original, surroundings
    mask_area: str = "whole"  # whole, masked
    mask_padding: int = 0  # pixels of the image, around the mask; for mask_area = masked
    width: int = 0
    height: int = 0
    resize_mode: str = "crop"  # crop, pad, stretch
    input_fidelity: str = "low"  # low, high
    n: int = 1
    seed: int = 0
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.5  # for models that have a second scale, of the image
    strength: float | None = None  # None: the model's default, which depends on whether there is a mask
    scheduler: str = ""  # empty: the model's default
    max_sequence_length: int = 0  # 0: the model's default
    truncate_prompt: bool = False
    output_format: str = "png"  # png, jpeg, webp
    output_compression: int = 100  # percent, jpeg and webp
    background: str = "auto"  # auto, opaque, transparent
    metadata: bool = True  # write seed and settings into the file
    partial_images: int = 0
    progress: bool = False  # send Progress for each step
    preferred_strength: float | None = None  # replaces the model's default where the whole image is edited
    preferred_scheduler: str = ""  # of a `quality` preset; used if `scheduler` is empty and the engine has it
    quality: str = ""  # name of the preset, for the file's metadata
    shortcuts: str = ""  # engine shortcuts of a `quality` preset; empty: exact computation
    adapters: tuple[tuple[str, float], ...] = ()  # alias and weight of each LoRA adapter
    input_pixels: int = 0  # of the images and the mask, by their headers

    @property
    def is_heavy(self) -> bool:
        """Whether preparing it takes long."""
        return self.input_pixels > _LIGHT_PIXELS

    def seed_of(self, picture: int) -> int:
        """Return the seed of picture `picture`, which reproduces this picture alone."""
        return (self.seed + picture) % SEEDS

    def to_json(self) -> bytes:
        """Encode the record as UTF-8 JSON, without the fields that have their default values."""
        values = {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"), default=dataclasses.asdict).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ImageRequest:
        """Decode a record from `to_json`.

        Raises:
            LinkGarbage: the data is not an image request.
        """
        try:
            values = json.loads(data)
            if "images" in values:
                values["images"] = tuple(Blob(**blob) for blob in values["images"])
            if "mask" in values:
                values["mask"] = Blob(**values["mask"])
            if "adapters" in values:
                values["adapters"] = tuple((str(alias), float(weight)) for alias, weight in values["adapters"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LinkGarbage(f"not an image request: {error}") from None


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ImageRequest)}  # MISSING is not equal to any value
