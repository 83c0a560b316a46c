"""The image and the mask of a request: their number and headers, and what the model can do with them.

No image is decoded here: headers only. A worker decodes, and decides whether an image has transparent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from ovserve.api.exchange import Upload
from ovserve.api.parameters.fields import GENERATION
from ovserve.api.parameters.gather import PATHS, Gathered, is_empty
from ovserve.api.parameters.imagehead import ImageHead, read_head
from ovserve.api.parameters.values import shown
from ovserve.errors import BadRequest, InvalidType, InvalidValue, MissingParameter, UnsupportedParameter
from ovserve.models.catalog import ServedModel
from ovserve.models.classes import describe_images
from ovserve.settings.options import Settings

__all__ = ["Pictures", "check_pictures", "reject_text_images"]


@dataclass(frozen=True, slots=True)
class Pictures:
    """The uploads that a request uses; all are empty for a generation.

    Attributes:
        images, mask: the uploads.
        ignored: names of the images that are not used, with their numbers: `image[1]` is the second.
        pixels: of the images and the mask together, by their headers.
    """

    images: tuple[Upload, ...] = ()
    mask: Upload | None = None
    ignored: tuple[str, ...] = ()
    pixels: int = 0


def reject_text_images(gathered: Gathered, is_json: bool) -> None:
    """Raise an error that says what to send, for an image that is neither a file nor, in JSON, a data URL.

    Raises:
        UnsupportedParameter: a reference to a file by id.
        InvalidValue: a URL that would have to be fetched.
        InvalidType: any other text or JSON value.
    """
    for name in ("image", "mask"):
        for spelled, value in gathered.values.get(name, ()):
            if is_empty(value) or value == []:
                continue
            reference = value[0] if isinstance(value, list) and value else value
            for member in ("image_url", "url"):
                reference = reference.get(member, reference) if isinstance(reference, dict) else reference
            if isinstance(reference, dict) and "file_id" in reference:
                raise UnsupportedParameter(
                    f"{spelled} refers to a file by id, which is not supported; send the image itself.", param=spelled
                )
            if isinstance(reference, str) and reference.startswith(("http://", "https://")):
                raise InvalidValue(
                    f"{spelled} is {shown(reference)}; URLs are not fetched, send the image itself or a data URL.",
                    param=spelled,
                )
            if is_json:
                raise InvalidType(f"{spelled} is {shown(reference)}; expected a data URL or base64.", param=spelled)
            raise InvalidType(f"{spelled} is a string; expected a file (a part with a filename).", param=spelled)


def check_pictures(gathered: Gathered, endpoint: str, model: ServedModel, settings: Settings) -> Pictures:
    """Check the uploads of a request against the endpoint, the server's limits and the model's tasks.

    Raises:
        BadRequest: or one of its subclasses; `param` is the upload at fault, or `model` if it cannot generate.
    """
    if endpoint == GENERATION:
        if "text2image" not in model.profile.tasks:
            raise BadRequest(
                f"The model {model.name!r} is an inpainting model and needs an image; use images/edits.",
                param="model",
            )
        return Pictures()
    if not model.profile.tasks & {"image2image", "inpainting"}:
        raise UnsupportedParameter(
            f"image is not supported: model {model.name!r} cannot edit images; use another one, or images/generations.",
            param="image",
        )
    pictures, heads = _check_uploads(gathered, endpoint, model, settings)
    _check_task(model, pictures.mask, heads[0])
    return pictures


def _check_uploads(
    gathered: Gathered, endpoint: str, model: ServedModel, settings: Settings
) -> tuple[Pictures, list[ImageHead]]:
    """Return the uploads and the headers of the images."""
    images = gathered.uploads.get("image", [])
    masks = gathered.uploads.get("mask", [])
    if not images:
        raise MissingParameter(f"image is missing; {PATHS[endpoint]} requires it.", param="image")
    if len(images) > settings.max_images:
        raise InvalidValue(
            f"image was sent {len(images)} times; this server allows at most {settings.max_images} images.",
            param="image",
        )
    if len(masks) > 1:
        raise InvalidValue(f"mask was sent {len(masks)} times; send one mask, for the first image.", param="mask")
    ignored: tuple[str, ...] = ()
    taken = model.profile.max_images
    if model.limits.extra_images == "first":
        names = [upload.name.partition("[")[0] for upload in images]
        ignored = tuple(f"{name}[{number}]" for number, name in enumerate(names) if number >= taken)
        images = images[:taken]
    heads = [read_head(upload.view(), upload.name, settings) for upload in images]
    if len(images) > taken:
        takes = describe_images(model.profile.references)
        first = f"the first {taken}" if taken > 1 else "the first one"
        raise UnsupportedParameter(
            f"image was sent {len(images)} times; model {model.name!r} takes {takes}. The server's option "
            f"extra_images = first uses {first}.",
            param=images[taken].name,
        )
    measured = list(heads)
    if masks:
        measured.append(read_head(masks[0].view(), masks[0].name, settings))
    _check_mask_mode(gathered, has_mask=bool(masks))
    pixels = sum(head.width * head.height for head in measured)
    return Pictures(tuple(images), masks[0] if masks else None, ignored, pixels), heads


def _check_mask_mode(gathered: Gathered, *, has_mask: bool) -> None:
    """Raise InvalidValue for `mask_mode` or `mask_invert` that do not fit the presence of a mask."""
    for spelled, mask_mode in gathered.values.get("mask_mode", ()):
        if not has_mask and mask_mode not in ("auto", "none"):
            raise InvalidValue(
                f"{spelled} is {shown(mask_mode)}, but no mask was sent; send a mask, or leave mask_mode out.",
                param=spelled,
            )
        if has_mask and mask_mode == "none":
            raise InvalidValue(
                f"{spelled} is 'none', but a mask was sent; leave the mask or mask_mode out.", param=spelled
            )
    for spelled, value in gathered.values.get("mask_invert", ()):
        if not has_mask and str(value).lower() not in ("false", "0"):
            raise InvalidValue(
                f"{spelled} is {shown(value)}, but no mask was sent; send a mask, or leave mask_invert out.",
                param=spelled,
            )


def _check_task(model: ServedModel, mask: Upload | None, head: ImageHead) -> None:
    tasks = model.profile.tasks
    if mask is not None and "inpainting" not in tasks:
        raise UnsupportedParameter(f"mask is not supported: model {model.name!r} cannot inpaint.", param="mask")
    if mask is None and "image2image" not in tasks and not head.may_be_transparent:
        raise MissingParameter(
            f"mask is missing; model {model.name!r} only inpaints: send a mask, or an image with transparent pixels.",
            param="mask",
        )
