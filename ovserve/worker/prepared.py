"""A prepared request: makes works for an engine, and turns the painted results into encoded pictures.

    PreparedRequest ──work(k)──▶ Work ──engine──▶ Outcome.pixels ──assemble──▶ result ──encode──▶ bytes
                                                  Preview.pixels ──encode_preview──▶ bytes

Runs in: worker; `work` in the prepare threads, the rest in the finish thread. The records are never changed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve import __version__
from ovserve.engines.protocol import Work
from ovserve.pixels.frames import Placement
from ovserve.pixels.images import Pixels, encode_image, flatten, has_alpha
from ovserve.pixels.masks import Seam
from ovserve.pixels.png_writer import png_bound
from ovserve.pixels.regions import Region
from ovserve.settings.options import Resolution
from ovserve.wire.request import ImageRequest

__all__ = ["Backdrop", "PreparedRequest", "on_one_line"]

_LABELS = ("negative prompt:", "steps:")  # with which the second and the last line of the metadata begin
_LINE_BREAKS = re.compile("[\\x85\\u2028\\u2029]")  # as str.splitlines and editors see them; JSON keeps these


def on_one_line(text: str) -> str:
    """Return a prompt as one line of the metadata: unchanged, or as a JSON string where it could be misread."""
    start = text.lstrip()
    if text.splitlines() in ([text], []) and not start.startswith('"') and not start.lower().startswith(_LABELS):
        return text
    return _LINE_BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """The picture that a painted frame is composited onto, and how.

    Attributes:
        original: the caller's image in the frame, RGB or RGBA; None where the result shows nothing of it.
        seam: where the painted frame shows; None where it shows everywhere.
        keeps_alpha: the result gets the original's alpha (background=transparent).
        is_opaque: the result gets no alpha (background=opaque).
    """

    original: Pixels | None
    seam: Seam | None
    keeps_alpha: bool
    is_opaque: bool

    def composite(self, painted: Pixels) -> Pixels:
        """Return the result: the caller's own pixels outside the mask, and alpha as requested."""
        if self.original is None:
            return painted
        result = self.seam.paste(self.original, painted) if self.seam is not None else painted
        if self.keeps_alpha:
            return _with_alpha(result, self.original)
        if has_alpha(result) and (self.is_opaque or result[..., 3].min() == 255):
            return flatten(result)
        return result


def _owner(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _with_alpha(result: Pixels, original: Pixels) -> Pixels:
    rgba = original.copy()
    rgba[..., :3] = result[..., :3]
    return rgba


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRequest:
    """A validated request with its decoded pixels and resolved parameters.

    Attributes:
        request: the request as it came from the front end, with the scheduler resolved.
        model: the model's name.
        sampler: name of the scheduler that will run, for the file's metadata.
        mode: text2image, image2image, inpainting.
        strength: the strength that will run.
        steps: denoising steps that will run for each picture.
        frame: size of the result.
        region: the part of the frame that the model works on; None for all of it.
        placement: where the frame, or that part of it, lies on the canvas that the model works on.
        backdrop: what a painted frame is composited onto.
        preview_frame: size of previews, which show only the region if there is one.
        preview_backdrop: the backdrop at that size.
        mask: uint8 (H, W), 255 = repaint, in the frame; None unless inpainting.
        initial_image: the original on the canvas, RGB.
        mask_image: the mask on the canvas, pooled to the latent grid.
        reference_images: what a model that edits by reference sees, the edited image first; as in `protocol.Work`.
        prompt: the prompt that will be used.
        negative_prompt: the negative prompt that will be used; empty where it has no effect.
        guidance_scale: the guidance scale for the engine, see `FamilyTraits.engine_guidance`.
        text_tokens: for `usage`.
        image_tokens, output_tokens: for `usage`; a picture counts one token for each cell of side_multiple_px.
        revised_prompt: the prompt that will be used, if the request's prompt was cut; else empty.
        background: transparent if a result has transparent pixels, else opaque.
        unchanged: the result of zero steps, the source in the frame; None if steps will run.
        colour_profile: the source's ICC profile, or empty. A result has the source's samples outside the mask, and the
            painted pixels follow them.
    """

    request: ImageRequest
    model: str
    sampler: str
    mode: str
    strength: float
    steps: int
    frame: Resolution
    placement: Placement
    backdrop: Backdrop
    preview_frame: Resolution
    preview_backdrop: Backdrop
    mask: Pixels | None
    initial_image: Pixels | None
    mask_image: Pixels | None
    reference_images: tuple[Pixels, ...]
    prompt: str
    negative_prompt: str
    guidance_scale: float
    text_tokens: int
    image_tokens: int
    output_tokens: int
    revised_prompt: str
    background: str
    colour_profile: bytes
    unchanged: Pixels | None = None
    region: Region | None = None

    @property
    def pixel_bytes(self) -> int:
        """Memory of all decoded pixels; arrays that share memory count once."""
        arrays: list[NDArray[Any] | None] = [self.mask, self.initial_image, self.mask_image, self.unchanged]
        arrays += self.reference_images
        for backdrop in (self.backdrop, self.preview_backdrop):
            arrays += [backdrop.original, None if backdrop.seam is None else backdrop.seam.weight]
        owners = {id(owner): owner.nbytes for array in arrays if array is not None for owner in [_owner(array)]}
        return sum(owners.values())

    def work(self, job_id: str, picture: int, *, alone: bool = False) -> Work:
        """Return the work of one picture for an engine."""
        request = self.request
        return Work(
            job=job_id,
            picture=picture,
            mode=self.mode,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.placement.canvas.width,
            height=self.placement.canvas.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=self.guidance_scale,
            strength=self.strength,
            seed=request.seed_of(picture),
            initial_image=self.initial_image,
            mask_image=self.mask_image,
            reference_images=self.reference_images,
            prompt_2=request.prompt_2,
            prompt_3=request.prompt_3,
            negative_prompt_2=request.negative_prompt_2,
            negative_prompt_3=request.negative_prompt_3,
            max_sequence_length=request.max_sequence_length,
            scheduler=request.scheduler,
            shortcuts=request.shortcuts,
            alone=alone,
            previews=self._preview_steps(),
            request=request,
        )

    def _preview_steps(self) -> frozenset[int]:
        """Return the steps after which a preview is made: evenly spread, without the last, which the result follows."""
        count = min(self.request.partial_images, self.steps - 1)
        return frozenset(round((index + 1) * self.steps / (count + 1)) for index in range(count))

    def assemble(self, painted: Pixels) -> Pixels:
        """Return the result from a painted canvas: its frame composited onto the backdrop."""
        if self.unchanged is not None:
            return self.unchanged
        fresh = self.placement.extract_frame(painted)
        return self.backdrop.composite(fresh if self.region is None else self.region.place(fresh))

    def encode(self, pixels: Pixels, picture: int) -> bytes:
        """Encode a result in the requested format."""
        request = self.request
        parameters = self._parameters(picture) if request.metadata else ""
        return encode_image(pixels, request.output_format, request.output_compression, parameters, self.colour_profile)

    def bound_of(self, picture: int) -> int:
        """Return an upper limit of the bytes of a result's file; 0 if there is none, as for JPEG and WebP."""
        request, original = self.request, self.backdrop.original
        if request.output_format != "png":
            return 0
        channels = 3 if original is None else original.shape[2]
        parameters = self._parameters(picture) if request.metadata else ""
        return png_bound(self.frame.width, self.frame.height, channels, parameters, self.colour_profile)

    def encode_preview(self, pixels: Pixels) -> bytes:
        """Encode an estimate of the whole canvas, of any size, in the requested format, small and without metadata."""
        shown = self.preview_backdrop.composite(self.placement.extract_preview(pixels, self.preview_frame))
        request = self.request
        return encode_image(shown, request.output_format, request.output_compression, profile=self.colour_profile)

    def _parameters(self, picture: int) -> str:
        """Return seed and settings in the form that common image tools read.

        The prompt, the negative prompt, then one line of pairs. A prompt cannot add a line, nor look like another.
        """
        request = self.request
        pairs: list[tuple[str, object]] = [
            ("Steps", request.num_inference_steps),
            ("Sampler", self.sampler),
            ("CFG scale", f"{request.guidance_scale:g}"),
            ("Seed", request.seed_of(picture)),
            *((("Quality", request.quality),) if request.shortcuts else ()),
            ("Size", str(self.frame)),
            ("Model", self.model),
        ]
        if request.adapters:
            pairs.append(("Lora weights", json.dumps(", ".join(f"{name}: {w:g}" for name, w in request.adapters))))
        if self.mode != "text2image":
            pairs.append(("Denoising strength", f"{self.strength:g}"))
        pairs.append(("Version", f"ovserve {__version__}"))
        lines = [on_one_line(self.prompt)]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {on_one_line(self.negative_prompt)}")
        lines.append(", ".join(f"{key}: {value}" for key, value in pairs))
        return "\n".join(lines)
