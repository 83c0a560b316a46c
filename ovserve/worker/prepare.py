"""Turns an ImageRequest into a PreparedRequest: decodes its images, resolves its parameters, checks both.

`prepare` raises for everything that can be wrong with a request, so that any later error is the server's.
Runs in: worker, the prepare threads.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ovserve.engines.protocol import Engine, Features
from ovserve.errors import InvalidValue, MissingParameter, UnsupportedParameter
from ovserve.models.classes import describe_images
from ovserve.models.profile import ModelProfile
from ovserve.models.steps import default_strength, denoising_steps, is_lcm, smallest_strength
from ovserve.pixels.decoder import DecodedImage, decode_here
from ovserve.pixels.frames import Fitting, Placement, fit_into, size_of
from ovserve.pixels.holes import fill_holes, join_alpha, mask_from_alpha, settle_alpha
from ovserve.pixels.images import Limits, Pixels, flatten, has_alpha
from ovserve.pixels.masks import Seam, check_not_empty, mask_from_image, match_mask, pool
from ovserve.pixels.references import HIGH_FIDELITY_PIXELS, REFERENCE_PIXELS, fit_reference
from ovserve.pixels.regions import Region
from ovserve.settings.options import ModelSettings, Resolution
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.request import ImageRequest
from ovserve.worker.prepared import Backdrop, PreparedRequest
from ovserve.worker.prompts import fit_prompt

__all__ = ["DecodeFile", "check_steps", "prepare"]


class DecodeFile(Protocol):
    """Decodes one image file: `ovserve.pixels.decoder.Decoder.decode` for one job."""

    def __call__(self, data: memoryview, name: str, limits: Limits, *, needs_profile: bool) -> DecodedImage:
        """Return the first frame. Raises ImageError."""


_SHAPE_TOLERANCE = 0.02  # relative difference of two shapes up to which nothing visible is cut off
PREVIEW_SIDE_PX = 512  # a preview is shown for a second: it does not need every pixel


def prepare(
    request: ImageRequest,
    profile: ModelProfile,
    model: ModelSettings,
    settings: WorkerSettings,
    engine: Engine,
    *,
    blobs: WorkerBlobs,
    decode: DecodeFile = decode_here,
    counting: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - reusable and without state
) -> PreparedRequest:
    """Decode, orient and fit the images, read the mask, count the tokens.

    `decode` decodes one image file. `counting` is entered while the engine is used.

    Raises:
        BadRequest: one of its subclasses, naming the field that is wrong.
    """
    request = _adapt_to_engine(request, engine.features)
    with counting:
        engine.check(request)
        prompt, text_tokens = fit_prompt(request, profile, engine)
    limits = Limits(settings.max_image_pixels, settings.max_image_side_px)
    _check_image_count(request, engine.features)
    source, mask, colour_profile = _read_images(request, blobs, limits, decode)
    mode = "text2image" if source is None else "image2image" if mask is None else "inpainting"
    _check_mode(mode, profile, engine.features)
    if mode != "inpainting":
        _check_no_mask_fields(request)
    keeps_alpha = _resolve_keeps_alpha(request, source, model)
    strength = _resolve_strength(request, mode, profile)
    steps = check_steps(request, strength, profile)
    layout = _plan_layout(request, source, mask, profile, model, keeps_alpha=keeps_alpha)
    references = _first_reference(request, source, layout, profile)
    references += _further_references(request, profile, blobs, limits, decode)
    unchanged = None if steps or layout.original is None else _without_steps(layout.original, request)
    guidance_scale = profile.traits.engine_guidance(request.guidance_scale)
    preview_frame = fit_into(layout.placement.frame, Resolution(PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
    cells = math.prod((layout.placement.canvas.width, layout.placement.canvas.height)) // profile.side_multiple_px**2
    return PreparedRequest(
        request=request,
        model=profile.name,
        sampler=request.scheduler or profile.scheduling.name,
        mode=mode,
        strength=strength,
        steps=steps,
        frame=layout.frame,
        placement=layout.placement,
        region=layout.region,
        backdrop=layout.backdrop,
        preview_frame=preview_frame,
        preview_backdrop=_preview_backdrop(layout, request, preview_frame),
        mask=layout.mask,
        initial_image=layout.initial_image,
        mask_image=layout.mask_image,
        reference_images=references,
        prompt=prompt,
        negative_prompt=_negative_prompt(request, profile, guidance_scale),
        guidance_scale=guidance_scale,
        text_tokens=text_tokens,
        image_tokens=_image_tokens(references, profile) or cells * len(request.images),
        output_tokens=cells * request.n,
        revised_prompt=prompt if prompt != request.prompt else "",
        background="transparent" if _has_transparent_result(layout, request, unchanged) else "opaque",
        colour_profile=colour_profile,
        unchanged=unchanged,
    )


def _negative_prompt(request: ImageRequest, profile: ModelProfile, guidance_scale: float) -> str:
    """Return the negative prompt; empty without classifier-free guidance, where the library rejects one."""
    if not profile.takes_negative_prompt or guidance_scale <= 1:
        return ""
    return request.negative_prompt or profile.traits.empty_negative_prompt


def _adapt_to_engine(request: ImageRequest, features: Features) -> ImageRequest:
    """Return the request with the preset's scheduler where the engine has it, and without previews it cannot make."""
    if not request.scheduler and request.preferred_scheduler in features.schedulers:
        request = replace(request, scheduler=request.preferred_scheduler)
    return request if features.previews else replace(request, partial_images=0)


def _check_no_mask_fields(request: ImageRequest) -> None:
    """Raise InvalidValue for a field that needs a mask."""
    for name, value in (("mask_blur", 0), ("mask_fill", "original"), ("mask_area", "whole")):
        if getattr(request, name) != value:
            raise InvalidValue(f"{name}: needs a mask; send one, or an image with transparent pixels", param=name)


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The sizes a request is served at and its pixels at these sizes.

    Attributes:
        original: the source in the frame, RGB or RGBA; None without one. The others are as in PreparedRequest.
        opacity: the image's alpha in the frame if the mask is made of it: uint8 (H, W); else None.
    """

    frame: Resolution
    placement: Placement
    backdrop: Backdrop
    mask: Pixels | None = None
    initial_image: Pixels | None = None
    mask_image: Pixels | None = None
    original: Pixels | None = None
    opacity: Pixels | None = None
    region: Region | None = None


def _plan_layout(
    request: ImageRequest,
    source: Pixels | None,
    mask: Pixels | None,
    profile: ModelProfile,
    model: ModelSettings,
    *,
    keeps_alpha: bool,
) -> _Layout:
    """Choose frame and canvas, and fit image and mask to both.

    Raises:
        InvalidValue: nothing of the mask is left in the frame.
    """
    frame = Resolution(request.width, request.height) if request.width else profile.native
    is_part = request.mask_area == "masked"  # then there are a source and a mask
    if source is not None and (is_part or not request.width):
        frame = fit_into(size_of(source), model.max_resolution)
    placement = Placement.plan(frame, profile.working_size(frame.width, frame.height), profile.working_multiple_px)
    is_opaque = request.background == "opaque"
    if source is None:
        return _Layout(frame, placement, Backdrop(None, None, keeps_alpha, is_opaque))
    fitting = Fitting.plan(size_of(source), frame, "stretch" if is_part else request.resize_mode)
    original = fitting.fit_image(source)
    if mask is None:
        shown = original if keeps_alpha else None
        initial_image = placement.place_image(flatten(original))
        return _Layout(
            frame, placement, Backdrop(shown, None, keeps_alpha, is_opaque), None, initial_image, None, original
        )
    mask = fitting.fit_mask(mask)
    check_not_empty(mask, " in the part of the image that is used")
    below, opacity, filled = original, None, fill_holes(original)
    shown = original
    if has_alpha(original):
        # The model sees no white where it repaints transparent pixels, and what a viewer sees elsewhere.
        shown = np.where(mask[..., None] > 0, filled, flatten(original))
        if request.mask is None:  # the mask is the image's own alpha
            below, opacity = filled if request.mask_blur else original[..., :3], original[..., 3]
    if request.mask_fill == "surroundings":
        shown = fill_holes(join_alpha(shown, 255 - mask))
    backdrop = Backdrop(below, Seam.plan(mask, request.mask_blur, opacity), keeps_alpha, is_opaque)
    region, part = None, mask
    if is_part:
        region, placement = _plan_region(request, mask, profile)
        shown, part = np.ascontiguousarray(region.crop(shown)), region.crop(mask)
    mask_image = pool(placement.place_mask(part), profile.side_multiple_px)
    initial_image = placement.place_image(shown)
    return _Layout(frame, placement, backdrop, mask, initial_image, mask_image, original, opacity, region)


def _plan_region(request: ImageRequest, mask: Pixels, profile: ModelProfile) -> tuple[Region, Placement]:
    """Return the part of the frame around the mask, and its place on the canvas: `size` is that of the part."""
    shape = Resolution(request.width, request.height) if request.width else None
    region = Region.around(mask, request.mask_padding, shape)
    wanted = shape or region.size
    canvas = profile.working_size(wanted.width, wanted.height)
    return region, Placement.plan(region.size, canvas, profile.working_multiple_px)


def _without_steps(original: Pixels, request: ImageRequest) -> Pixels:
    """Return the result of an edit that runs no step: the source in the frame, with its alpha unless it is removed."""
    return flatten(original) if request.background == "opaque" else original


def _has_transparent_result(layout: _Layout, request: ImageRequest, unchanged: Pixels | None) -> bool:
    """Return whether a result has transparent pixels; they can only be the source's own."""
    if unchanged is not None:
        return request.output_format != "jpeg" and has_alpha(unchanged) and bool(unchanged[..., 3].min() < 255)
    original = layout.backdrop.original
    if original is None or not has_alpha(original) or request.background == "opaque" or request.output_format == "jpeg":
        return False
    if layout.backdrop.keeps_alpha or layout.mask is None:
        return layout.backdrop.keeps_alpha
    return bool((original[..., 3] < 255)[layout.mask == 0].any())


def _preview_backdrop(layout: _Layout, request: ImageRequest, size: Resolution) -> Backdrop:
    """Return the backdrop at the size of a preview: a seam of the result's size would take as long as the result's."""
    backdrop = layout.backdrop
    if layout.region is not None:  # previews show only the part that is painted
        return Backdrop(None, None, keeps_alpha=False, is_opaque=True)
    if not request.partial_images or size == layout.frame:
        return backdrop
    fitting = Fitting.plan(layout.frame, size, "stretch")
    original, opacity = backdrop.original, layout.opacity
    if original is not None:
        original = fitting.fit_image(original if opacity is None else join_alpha(original, opacity))
    if original is not None and opacity is not None:
        original, opacity = fill_holes(original) if request.mask_blur else original[..., :3], original[..., 3]
    blur_px = round(request.mask_blur * size.width / layout.frame.width)
    seam = None if layout.mask is None else Seam.plan(fitting.fit_mask(layout.mask), blur_px, opacity)
    return Backdrop(original, seam, backdrop.keeps_alpha, backdrop.is_opaque)


def _read_images(
    request: ImageRequest, blobs: WorkerBlobs, limits: Limits, decode: DecodeFile
) -> tuple[Pixels | None, Pixels | None, bytes]:
    """Return the image, the mask at the image's size, both upright, and the image's colour profile.

    None, and an empty profile, for what the request does not have. The image is the first of several.
    """
    if not request.images:
        return None, None, b""
    with blobs.open(request.images[0]) as data:
        image = decode(data, "image", limits, needs_profile=True)
    source = image.pixels
    mask = None
    if request.mask is not None:
        with blobs.open(request.mask) as data:
            mask_image = decode(data, "mask", limits, needs_profile=False).pixels
        mask = mask_from_image(mask_image, request.mask_mode)
        if request.mask_invert:
            mask = 255 - mask
        check_not_empty(mask)
        mask = match_mask(mask, size_of(source))
    elif request.task == "edit" and request.background != "transparent" and request.mask_mode != "none":
        mask = mask_from_alpha(source)
        source = settle_alpha(source)
    return source, mask, image.colour_profile


def _check_image_count(request: ImageRequest, features: Features) -> None:
    """Raise UnsupportedParameter for more images than the engine can take: another one than the front end expects."""
    count = len(request.images)
    if count > max(1, features.references):
        takes = describe_images(features.references)
        raise UnsupportedParameter(f"image: {count} images were sent; this model takes {takes}", param="image")


def _first_reference(
    request: ImageRequest, source: Pixels | None, layout: _Layout, profile: ModelProfile
) -> tuple[Pixels, ...]:
    """Return the edited image as a reference, if the model edits by reference.

    It is the image on the canvas, so that the result lies over it. Only where a size of another shape was requested
    without saying how to fit the image, the model gets all of it, in its own shape. With input_fidelity=high and no
    mask, it gets the image in its own size.
    """
    if not profile.references or source is None or layout.initial_image is None:
        return ()
    across, down = request.width * source.shape[0], request.height * source.shape[1]
    has_other_shape = abs(across - down) > _SHAPE_TOLERANCE * max(across, down)
    is_whole = layout.mask is None and request.resize_mode == "crop" and has_other_shape
    has_detail = layout.mask is None and request.input_fidelity == "high" and request.resize_mode == "crop"
    shown = source if is_whole or has_detail else layout.initial_image
    return (fit_reference(shown, profile.side_multiple_px, _reference_limit(request)),)


def _image_tokens(references: tuple[Pixels, ...], profile: ModelProfile) -> int:
    """Return how many tokens the references add to each step."""
    return sum(int(image.shape[0]) * int(image.shape[1]) for image in references) // int(profile.side_multiple_px) ** 2


def _reference_limit(request: ImageRequest) -> int:
    return HIGH_FIDELITY_PIXELS if request.input_fidelity == "high" else REFERENCE_PIXELS


def _further_references(
    request: ImageRequest, profile: ModelProfile, blobs: WorkerBlobs, limits: Limits, decode: DecodeFile
) -> tuple[Pixels, ...]:
    """Decode the images after the first, one at a time: only their fitted pixels stay in memory."""
    found = []
    for number, blob in enumerate(request.images[1:], 1):
        with blobs.open(blob) as data:
            pixels = decode(data, f"image[{number}]", limits, needs_profile=False).pixels
        found.append(fit_reference(pixels, profile.side_multiple_px, _reference_limit(request)))
    return tuple(found)


def _check_mode(mode: str, profile: ModelProfile, features: Features) -> None:
    if mode in features.tasks:
        return
    if "inpainting" in features.tasks and mode == "image2image":
        raise MissingParameter(f"mask: model {profile.name!r} only does inpainting; send a mask", param="mask")
    raise UnsupportedParameter(f"model {profile.name!r} does not serve {mode}", param="model")


def _resolve_keeps_alpha(request: ImageRequest, source: Pixels | None, model: ModelSettings) -> bool:
    """Return whether a result gets the source's alpha. Raises InvalidValue when that is impossible."""
    if request.background != "transparent":
        return False
    if request.output_format == "jpeg":
        raise InvalidValue("background: transparent needs output_format png or webp", param="background")
    if source is None or not has_alpha(source):
        if model.missing_alpha == "opaque":
            return False
        raise InvalidValue(
            "background: transparent needs an image with an alpha channel; the model itself makes opaque pictures",
            param="background",
        )
    return True


def _resolve_strength(request: ImageRequest, mode: str, profile: ModelProfile) -> float:
    if mode == "text2image":
        return 1.0
    if request.strength is not None:
        return request.strength
    return default_strength(
        profile,
        is_masked=mode == "inpainting",
        is_variation=request.task == "variation",
        preferred=request.preferred_strength,
    )


def check_steps(request: ImageRequest, strength: float, profile: ModelProfile) -> int:
    """Return how many steps will run, 0 at strength 0; `strength` is the one that will run, 1.0 for text-to-image.

    Raises:
        InvalidValue: the strength is out of range, or leaves too few steps.
    """
    count = request.num_inference_steps
    if not 0 <= strength <= 1:
        raise InvalidValue(f"strength: {strength:g} is not within 0 to 1", param="strength")
    steps = denoising_steps(profile, request.scheduler, count, strength)
    if steps or not strength:
        return steps
    smallest = f"the smallest strength that works is {smallest_strength(profile, request.scheduler, count):g}"
    if is_lcm(profile, request.scheduler):
        longer = profile.scheduling.original_inference_steps
        raise InvalidValue(
            f"strength: {strength:g} leaves fewer than {count} of {longer} timesteps; {smallest}", param="strength"
        )
    raise InvalidValue(f"strength: {strength:g} of {count} steps is less than one step; {smallest}", param="strength")
