"""The image request: one frozen, validated record that crosses from the front end to a worker."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ovserve.errors import LinkGarbage
from ovserve.wire.blobs import Blob

__all__ = ["SEEDS", "ImageRequest"]

SEEDS = 2**32  # the library takes seeds modulo this


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What to make: one frozen, validated request, made in api.routes, read in device.worker.

    Travels as JSON in a spool segment (a prompt alone may be larger than a message). `n` pictures are asked for; picture k
    uses seed + k (mod 2**32). Width and height 0: as the image. `images` are empty for text-to-image.
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
    mask_mode: str = "auto"  # auto, alpha, luminance
    mask_blur: int = 0  # pixels
    width: int = 0
    height: int = 0
    resize_mode: str = "crop"  # crop, pad, stretch
    n: int = 1
    seed: int = 0
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    strength: float | None = None  # None: the model's default, which depends on whether there is a mask
    scheduler: str = ""  # empty: the model's own
    max_sequence_length: int = 0  # 0: the model's own
    truncate_prompt: bool = False
    output_format: str = "png"  # png, jpeg, webp
    output_compression: int = 100  # percent, jpeg and webp
    background: str = "auto"  # auto, opaque, transparent
    metadata: bool = True  # write seed and settings into the file
    partial_images: int = 0
    progress: bool = False  # send Progress for each step
    preferred_strength: float | None = None  # in place of the model's default where the whole image is edited
    preferred_scheduler: str = ""  # a `quality` preset's, where `scheduler` is empty and the engine has it
    quality: str = ""  # the preset's name, for the file's metadata
    shortcuts: str = ""  # empty: exact; else the engine shortcuts a `quality` preset asked for

    def seed_of(self, picture: int) -> int:
        """The seed of picture `picture`, with which it can be had again alone."""
        return (self.seed + picture) % SEEDS

    def to_json(self) -> bytes:
        """The record as UTF-8 JSON, without the fields that are at their defaults."""
        values = {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"), default=dataclasses.asdict).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ImageRequest:
        """The record again. Raises LinkGarbage."""
        try:
            values = json.loads(data)
            if "images" in values:
                values["images"] = tuple(Blob(**blob) for blob in values["images"])
            if "mask" in values:
                values["mask"] = Blob(**values["mask"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LinkGarbage(f"no image request: {error}") from None


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ImageRequest)}  # MISSING equals no value
