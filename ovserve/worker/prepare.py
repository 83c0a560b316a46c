"""The way of one request through the pixels: from its uploads to work for an engine, and from results to encoded pictures.

    ImageRequest ──prepare──▶ PreparedRequest ──work(k)──▶ Work ──engine──▶ Outcome ──PreparedRequest.assemble──▶ ──PreparedRequest.encode──▶ bytes

`prepare` raises for everything that can be wrong with a request, so that what goes wrong after it is ours.
Runs in: worker; `prepare` in the prepare thread, `assemble` and `encode` in the finish thread; a PreparedRequest is never changed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np

from ovserve import __version__
from ovserve.engines.protocol import CLIP_WINDOW, Engine, Work, check_served, clip_only_fields, has_t5
from ovserve.errors import InvalidValue, MissingParameter, PromptTooLong, UnsupportedParameter
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.models.steps import is_lcm, least_strength, steps_run
from ovserve.pixels.frames import Fitting, Placement, fit_into, size_of
from ovserve.pixels.images import (
    Limits,
    Pixels,
    colour_profile,
    decode_image,
    encode_image,
    flatten,
    has_alpha,
)
from ovserve.pixels.masks import Seam, check_selects, holes, match_mask, pool, read_mask
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.blobs import Blob
from ovserve.wire.local.spool import open_blob
from ovserve.wire.request import ImageRequest

__all__ = ["PreparedRequest", "check_steps", "prepare"]

log = logging.getLogger(__name__)

PREVIEW_SIDE_PX = 512  # a preview is looked at for a second: no need for every pixel


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """What a painted frame is put into.

    Attributes:
        original: what the caller sent, in the frame, RGB or RGBA; None where the result shows nothing of it.
        seam: where the painted frame shows; None where it shows everywhere.
        keeps_alpha: the result has the original's alpha (background=transparent).
        is_opaque: the result has none (background=opaque).
    """

    original: Pixels | None
    seam: Seam | None
    keeps_alpha: bool
    is_opaque: bool

    def behind(self, painted: Pixels) -> Pixels:
        """The result: the caller's own pixels outside the mask, alpha as asked for."""
        if self.original is None:
            return painted
        result = self.seam.paste(self.original, painted) if self.seam is not None else painted
        if self.keeps_alpha:
            return _with_alpha(result, self.original)
        if has_alpha(result) and (self.is_opaque or result[..., 3].min() == 255):
            return flatten(result)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRequest:
    """A request that can be served, with its pixels ready.

    Attributes:
        mode: text2image, image2image, inpainting.
        steps: denoising steps that will run for each picture.
        frame: size of the result.
        backdrop: what a result is put into.
        preview_frame, preview_backdrop: the size of previews, and what they are put into.
        mask: uint8 (H, W), 255 = repaint, in the frame; None unless inpainting.
        initial_image, mask_image: the original and the mask on the canvas, RGB, and pooled to the latent grid.
        text_tokens, image_tokens, output_tokens: for `usage`; pictures count one token for each cell of side_multiple_px.
        revised_prompt: what is used in place of a prompt that was cut; else empty.
        background: transparent or opaque: whether a result has transparent pixels.
        colour_profile: the source's ICC profile: a result holds its samples, and what is painted follows them; else empty.
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
    prompt: str
    negative_prompt: str
    text_tokens: int
    image_tokens: int
    output_tokens: int
    revised_prompt: str
    background: str
    colour_profile: bytes

    def work(self, job: str, picture: int, *, alone: bool = False) -> Work:
        """Picture `picture` as a piece of work for an engine."""
        request = self.request
        return Work(
            job=job,
            picture=picture,
            mode=self.mode,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.placement.canvas.width,
            height=self.placement.canvas.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            strength=self.strength,
            seed=request.seed_of(picture),
            initial_image=self.initial_image,
            mask_image=self.mask_image,
            prompt_2=request.prompt_2,
            prompt_3=request.prompt_3,
            negative_prompt_2=request.negative_prompt_2,
            negative_prompt_3=request.negative_prompt_3,
            max_sequence_length=request.max_sequence_length,
            scheduler=request.scheduler,
            shortcuts=request.shortcuts,
            alone=alone,
            previews=self._preview_steps(),
        )

    def _preview_steps(self) -> frozenset[int]:
        """Spread evenly; the last step needs none, for the result follows at once."""
        count = min(self.request.partial_images, self.steps - 1)
        return frozenset(round((index + 1) * self.steps / (count + 1)) for index in range(count))

    def assemble(self, painted: Pixels) -> Pixels:
        """The result: the painted canvas in its frame, the caller's own pixels outside the mask, alpha as asked for."""
        return self.backdrop.behind(self.placement.back(painted))

    def encode(self, pixels: Pixels, picture: int) -> bytes:
        """A result as a file of the format asked for."""
        request = self.request
        parameters = self._parameters(picture) if request.metadata else ""
        return encode_image(pixels, request.output_format, request.output_compression, parameters, self.colour_profile)

    def encode_preview(self, pixels: Pixels) -> bytes:
        """An estimate of the whole canvas, at any size, as a small file of the format asked for, without metadata."""
        shown = self.preview_backdrop.behind(self.placement.glimpse(pixels, self.preview_frame))
        request = self.request
        return encode_image(shown, request.output_format, request.output_compression, profile=self.colour_profile)

    def _parameters(self, picture: int) -> str:
        """Seed and settings in the form that common image tools read: prompt, negative prompt, then one line of pairs."""
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
        if self.mode != "text2image":
            pairs.append(("Denoising strength", f"{self.strength:g}"))
        pairs.append(("Version", f"ovserve {__version__}"))
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{key}: {value}" for key, value in pairs))
        return "\n".join(lines)


def _with_alpha(result: Pixels, original: Pixels) -> Pixels:
    whole = original.copy()
    whole[..., :3] = result[..., :3]
    return whole


def prepare(
    request: ImageRequest, profile: ModelProfile, model: ModelSettings, settings: Settings, engine: Engine
) -> PreparedRequest:
    """Decode, orient and fit the images, read the mask, count the tokens.

    Raises:
        BadRequest: in one of its kinds; what is wrong with the request, naming the field.
    """
    if request.scheduler and request.scheduler not in engine.schedulers:
        raise InvalidValue(
            f"scheduler: {request.scheduler!r} is not served by this model; expected one of {', '.join(sorted(engine.schedulers))}",
            param="scheduler",
        )
    if not request.scheduler and request.preferred_scheduler in engine.schedulers:
        request = replace(request, scheduler=request.preferred_scheduler)
    prompt, text_tokens = _read_prompt(request, profile, engine)
    source, mask = _read_images(request, Limits(settings.max_image_pixels, settings.max_image_side_px))
    profile_of_source = _read_profile(request)
    mode = "text2image" if source is None else "image2image" if mask is None else "inpainting"
    _check_mode(mode, profile)
    if request.mask_blur and mode != "inpainting":
        raise InvalidValue("mask_blur: there is no mask, and no transparent pixel in the image", param="mask_blur")
    keeps_alpha = _keeps_alpha(request, source)
    strength = _strength(request, mode, profile)
    steps = check_steps(request, mode, strength, profile, engine)
    laid = _lay_out(request, source, mask, profile, model, keeps_alpha=keeps_alpha)
    preview_frame = fit_into(laid.frame, Resolution(PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
    cells = math.prod((laid.placement.canvas.width, laid.placement.canvas.height)) // profile.side_multiple_px**2
    return PreparedRequest(
        request=request,
        model=profile.name,
        sampler=request.scheduler or profile.scheduling.name,
        mode=mode,
        strength=strength,
        steps=steps,
        frame=laid.frame,
        placement=laid.placement,
        backdrop=laid.backdrop,
        preview_frame=preview_frame,
        preview_backdrop=_small_backdrop(laid, request, preview_frame),
        mask=laid.mask,
        initial_image=laid.initial_image,
        mask_image=laid.mask_image,
        prompt=prompt,
        # Without classifier-free guidance a negative prompt has no effect, and the library refuses it.
        negative_prompt=request.negative_prompt if profile.takes_negative_prompt and request.guidance_scale > 1 else "",
        text_tokens=text_tokens,
        image_tokens=cells * len(request.images),
        output_tokens=cells * request.n,
        revised_prompt=prompt if prompt != request.prompt else "",
        background="transparent" if _is_seen_through(laid, request) else "opaque",
        colour_profile=profile_of_source,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """The pixels of a request at the sizes they are worked with; the attributes are those of PreparedRequest."""

    frame: Resolution
    placement: Placement
    backdrop: Backdrop
    mask: Pixels | None = None
    initial_image: Pixels | None = None
    mask_image: Pixels | None = None


def _lay_out(
    request: ImageRequest,
    source: Pixels | None,
    mask: Pixels | None,
    profile: ModelProfile,
    model: ModelSettings,
    *,
    keeps_alpha: bool,
) -> _Laid:
    """Choose frame and canvas, and bring image and mask onto both. Raises InvalidValue for a mask that the frame cuts off."""
    frame = Resolution(request.width, request.height) if request.width else profile.native
    if source is not None and not request.width:
        frame = fit_into(size_of(source), model.max_resolution)
    placement = Placement.plan(frame, profile.working_size(frame.width, frame.height), profile.side_multiple_px)
    is_opaque = request.background == "opaque"
    if source is None:
        return _Laid(frame, placement, Backdrop(None, None, keeps_alpha, is_opaque))
    fitting = Fitting.plan(size_of(source), frame, request.resize_mode)
    original = fitting.image(source)
    initial_image = placement.image(flatten(original))
    if mask is None:
        shown = original if keeps_alpha else None
        return _Laid(frame, placement, Backdrop(shown, None, keeps_alpha, is_opaque), None, initial_image)
    mask = fitting.mask(mask)
    check_selects(mask, " in the part of the image that is used")
    mask_image = pool(placement.mask(mask), profile.side_multiple_px)
    backdrop = Backdrop(original, Seam.plan(mask, request.mask_blur), keeps_alpha, is_opaque)
    return _Laid(frame, placement, backdrop, mask, initial_image, mask_image)


def _is_seen_through(laid: _Laid, request: ImageRequest) -> bool:
    """Whether a result has transparent pixels, which are the source's own."""
    original = laid.backdrop.original
    if original is None or not has_alpha(original) or request.background == "opaque" or request.output_format == "jpeg":
        return False
    if laid.backdrop.keeps_alpha or laid.mask is None:
        return laid.backdrop.keeps_alpha
    return bool((original[..., 3] < 255)[laid.mask == 0].any())


def _small_backdrop(laid: _Laid, request: ImageRequest, size: Resolution) -> Backdrop:
    """The same at the size of a preview, whose seam would take as long as the result's at the result's size."""
    backdrop = laid.backdrop
    if not request.partial_images or size == laid.frame:
        return backdrop
    fitting = Fitting.plan(laid.frame, size, "stretch")
    original = None if backdrop.original is None else fitting.image(backdrop.original)
    blur_px = round(request.mask_blur * size.width / laid.frame.width)
    seam = None if laid.mask is None else Seam.plan(fitting.mask(laid.mask), blur_px)
    return Backdrop(original, seam, backdrop.keeps_alpha, backdrop.is_opaque)


def _read_prompt(request: ImageRequest, profile: ModelProfile, engine: Engine) -> tuple[str, int]:
    """The prompt to use, and its tokens. Raises PromptTooLong for a text that none of its encoders reads to the end."""
    by_clip = clip_only_fields(profile, request)
    names = ["prompt", "negative_prompt"]
    for encoder in range(2, profile.text_encoders + 1):
        names += [f"prompt_{encoder}", f"negative_prompt_{encoder}"]
    texts = {name: text for name in names if (text := str(getattr(request, name, ""))) or name == "prompt"}
    counts = {name: engine.count_tokens(text, clip=name in by_clip) for name, text in texts.items()}
    windows = {name: CLIP_WINDOW if name in by_clip else profile.prompt_tokens for name in texts}
    if counts["prompt"] > windows["prompt"] and request.truncate_prompt:
        texts["prompt"] = engine.cut_prompt(request.prompt, clip="prompt" in by_clip)
        counts["prompt"] = engine.count_tokens(texts["prompt"], clip="prompt" in by_clip)
    for name, count in counts.items():
        if count > windows[name]:
            advice = "; truncate_prompt=true cuts it" if name == "prompt" else ""
            raise PromptTooLong(
                f"{name}: {count} tokens, and the model reads {windows[name]} (marks of its begin and end included){advice}",
                param=name,
            )
    if has_t5(profile):
        for name in texts.keys() - by_clip - {"prompt_3", "negative_prompt_3"}:
            count = engine.count_tokens(texts[name], clip=True)
            if count > CLIP_WINDOW:
                log.info(
                    "a text is read whole by T5, and its beginning by CLIP",
                    extra=fields(model=profile.name, field=name, clip_tokens=count, clip_window=CLIP_WINDOW),
                )
    return texts["prompt"], counts["prompt"]


def _read_images(request: ImageRequest, limits: Limits) -> tuple[Pixels | None, Pixels | None]:
    """The image and the mask at its size, both upright; None where there is none."""
    if not request.images:
        return None, None
    if len(request.images) > 1:
        raise InvalidValue(
            f"image: {len(request.images)} images were given, and this model edits one: it takes no references",
            param="image",
        )
    source = _read_blob(request.images[0], "image", limits)
    mask = None
    if request.mask is not None:
        mask = read_mask(_read_blob(request.mask, "mask", limits), request.mask_mode)
        check_selects(mask)
        mask = match_mask(mask, size_of(source))
    elif request.task == "edit" and request.background != "transparent":
        mask = holes(source)
    return source, mask


def _read_blob(blob: Blob, name: str, limits: Limits) -> Pixels:
    with open_blob(blob) as data:
        return decode_image(data, name, limits)


def _read_profile(request: ImageRequest) -> bytes:
    if not request.images:
        return b""
    with open_blob(request.images[0]) as data:
        return colour_profile(data)


def _check_mode(mode: str, profile: ModelProfile) -> None:
    if mode in profile.tasks:
        return
    if "inpainting" in profile.tasks and mode == "image2image":
        raise MissingParameter(f"mask: model {profile.name!r} only fills masks: send one", param="mask")
    raise UnsupportedParameter(f"model {profile.name!r} does not serve {mode}", param="model")


def _keeps_alpha(request: ImageRequest, source: Pixels | None) -> bool:
    if request.background != "transparent":
        return False
    if request.output_format == "jpeg":
        raise InvalidValue("background: transparent needs output_format png or webp", param="background")
    if source is None or not has_alpha(source):
        raise InvalidValue(
            "background: transparent needs an image with transparency: the model itself paints opaque pictures",
            param="background",
        )
    return True


def _strength(request: ImageRequest, mode: str, profile: ModelProfile) -> float:
    if mode == "text2image":
        return 1.0
    if request.strength is not None:
        return request.strength
    if mode == "inpainting":
        return profile.defaults.strength_inpainting
    if request.preferred_strength is not None:
        return request.preferred_strength
    return profile.defaults.strength_variation if request.task == "variation" else profile.defaults.strength


def check_steps(request: ImageRequest, mode: str, strength: float, profile: ModelProfile, engine: Engine) -> int:
    """How many steps will run. Raises InvalidValue for counts that cannot be run."""
    count = request.num_inference_steps
    check_served(engine.name, profile, request)
    if not 0 <= strength <= 1:
        raise InvalidValue("strength: must be within 0..1", param="strength")
    if is_lcm(profile, request.scheduler):
        # LCM takes its steps from the part of a longer schedule that strength leaves.
        longer = profile.scheduling.original_inference_steps
        if steps_run(longer, strength) < count:
            raise InvalidValue(
                f"strength: {strength:g} leaves too few of {longer} timesteps for {count} steps: "
                f"the smallest that works is {math.ceil(100 * count / longer) / 100:g}",
                param="strength",
            )
        return count
    steps = count if mode == "text2image" else steps_run(count, strength)
    if steps < 1:
        raise InvalidValue(
            f"strength: {strength:g} of {count} steps is less than one step: "
            f"the smallest strength that works is {least_strength(count):g}",
            param="strength",
        )
    if mode != "text2image" and profile.family in ("sd3", "flux"):
        # Flow matching counts the steps that are left out, and cuts those: what is run is rounded up.
        return count - int(np.float32(count) - np.float32(count) * np.float32(strength))
    is_pndm = (request.scheduler or profile.scheduling.name.lower()) == "pndm"
    return (
        steps + 1 if is_pndm and count > 1 else steps
    )  # its second step is taken twice (arXiv:2202.09778, as diffusers has it)
