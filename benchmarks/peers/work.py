"""The work of every GenAI peer for one edit: decode the upload, run the pipeline, encode the reply.

It follows the library's own samples. The inpainting pipeline is created first, because the other order crashes.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["MULTIPLE_PX", "Pipelines", "encode_reply", "read_mask", "read_picture"]

MULTIPLE_PX = 8  # sides are multiples of this, for the UNet families


class Pipelines:
    """Image-to-image and inpainting pipelines with shared weights. Thread-safe: no."""

    def __init__(self, model: str, device: str = "CPU", threads: int = 0) -> None:
        import openvino_genai as og

        properties = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        # The other order, InpaintingPipeline(Image2ImagePipeline(...)), crashes the process when it is used (2026.4.1).
        self._inpainting = og.InpaintingPipeline(model, device, **properties)
        self._image2image = og.Image2ImagePipeline(self._inpainting)

    def generate(self, image: Image.Image, mask: Image.Image | None, fields: Mapping[str, str]) -> np.ndarray:
        """Return the pictures as uint8 (n, H, W, 3)."""
        options: dict[str, Any] = {
            "num_inference_steps": int(fields.get("num_inference_steps", 20)),
            "guidance_scale": float(fields.get("guidance_scale", 7.5)),
            "strength": float(fields.get("strength", 0.8)),
            "num_images_per_prompt": int(fields.get("n", 1)),
        }
        if "seed" in fields:
            options["rng_seed"] = int(fields["seed"])
        if mask is None:
            result = self._image2image.generate(fields["prompt"], _tensor(image), **options)
        else:
            options |= {"width": image.width, "height": image.height}
            result = self._inpainting.generate(fields["prompt"], _tensor(image), _tensor(mask), **options)
        return np.array(result.data)  # a copy: the next call overwrites the buffer

    def answer(self, image: bytes, mask: bytes | None, fields: Mapping[str, str]) -> dict[str, Any]:
        """Make a whole edit from files and fields, and return the response object."""
        picture = read_picture(image, fields.get("size", ""))
        area = read_mask(mask, picture.size) if mask else None
        return encode_reply([Image.fromarray(pixels) for pixels in self.generate(picture, area, fields)])


def read_picture(data: bytes, size: str = "") -> Image.Image:
    """Decode an upload as RGB, at `WxH` or its own size; sides are cut to a multiple of 8 and are at least 64."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    if size and size != "auto":
        width, height = (int(side) for side in size.split("x"))
    wanted = tuple(max(64, side // MULTIPLE_PX * MULTIPLE_PX) for side in (width, height))
    return image if image.size == wanted else image.resize(wanted)


def read_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Decode a mask as the library requires it: RGB, white = repaint, of the picture's size."""
    image = Image.open(io.BytesIO(data))
    area = image.convert("L")
    if "A" in image.getbands():  # OpenAI's form: transparent = repaint
        area = image.getchannel("A").point(lambda level: 255 - level)
    return area.resize(size).convert("RGB")


def encode_reply(images: list[Image.Image]) -> dict[str, Any]:
    """Return OpenAI's response object with base64 PNGs."""
    return {"created": int(time.time()), "data": [{"b64_json": _png_text(image)} for image in images]}


def _png_text(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _tensor(image: Image.Image) -> Any:
    import openvino as ov

    return ov.Tensor(np.ascontiguousarray(np.asarray(image, dtype=np.uint8))[None])
