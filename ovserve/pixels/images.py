"""Encoded bytes to uint8 arrays and back.

Arrays are `uint8 (H, W, 3)`, RGB, or `uint8 (H, W, 4)`, RGBA with unassociated alpha, 0..255, upright (orientation applied).
Runs in: worker, and only there: what a hostile file does to a decoder costs one worker and never the front end.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ovserve.errors import ImageError

__all__ = ["FORMATS", "Limits", "Pixels", "colour_profile", "decode_image", "encode_image", "flatten", "has_alpha"]

Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # every other decoder is attack surface without a user
PNG_COMPRESS_LEVEL = 1  # measured at 512 and 1024 px: level 6 takes 1.3 to 5 times as long for 7 to 20 % fewer bytes
_ORIENTATION = 0x0112  # TIFF and EXIF tag
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_PROFILE_LIMIT_BYTES = 1 << 20  # profiles of displays and cameras have 0.5 to 600 kB
# How Pillow names the samples of a PNG as they are stored.
_RGB_16 = "RGB;16B"
_STRETCHED = {"L;2": 85, "L;4": 17}  # gray of 2 and 4 bits, and what makes 8 of them
_APP1_LIMIT_BYTES = 65_000  # a JPEG segment holds 65533 bytes; the rest is room for the EXIF structure itself


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an image may be, by its header, before a single pixel is decoded."""

    pixels: int
    side_px: int


def decode_image(data: bytes | memoryview, name: str, limits: Limits) -> Pixels:
    """The first frame of an encoded image, upright, as RGB, or as RGBA where it has transparency.

    16-bit samples keep their high byte. Colour profiles are not applied: the samples come back as they are stored, and
    `colour_profile` says what they mean.

    Args:
        name: the field to name in an error: `image`, `image[1]`, `mask`.

    Raises:
        ImageError: no image in one of FORMATS, damaged, cut short, too large, or of samples that have no 8-bit meaning.
    """
    data = bytes(data)  # once: a stream over bytes shares them, one over a view copies it
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name, limits)
            if image.format == "PNG":
                image.verify()  # the check sums; its decoder alone takes a file cut short in the last chunk for whole
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            stored_as = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""  # gone after load
            image.load()
            _match_transparency(image, stored_as)
            # Read after load: the TIFF reader turns the picture itself and drops the tag.
            return _turn(_samples(image, name), _orientation(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises on strange bytes is the file's fault
        told = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ImageError(
            f"{name}: not a readable PNG, JPEG, WebP, GIF, BMP or TIFF image{told}"[:300], param=name
        ) from None


def colour_profile(data: bytes | memoryview) -> bytes:
    """The ICC profile of an image whose samples are RGB, for results that hold its pixels; empty where there is none to keep.

    A profile of another colour space (CMYK, gray) does not describe the RGB samples that `decode_image` makes.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        profile: bytes = image.info.get("icc_profile") or b""
    # ICC.1:2022, 7.2: the colour space of the data stands in bytes 16 to 19 of a header of 128.
    is_rgb = len(profile) > 128 and profile[16:20] == b"RGB "
    return profile if is_rgb and len(profile) <= _PROFILE_LIMIT_BYTES else b""


def _check_size(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels", param=name)
    if width * height > limits.pixels or max(width, height) > limits.side_px:
        raise ImageError(
            f"{name}: {width}x{height} is too large: at most {limits.pixels} pixels, {limits.side_px} on a side",
            param=name,
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged metadata beside sound pixels: take the pixels as they lie
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Make the picture upright (EXIF 2.32, tag Orientation: where row 0 and column 0 of the stored picture lie)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _samples(image: Image.Image, name: str) -> Pixels:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _samples_16(image)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: samples of 32 bits have no defined white: send 8 or 16 bits", param=name)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))  # a conversion to its own mode is a copy


def _match_transparency(image: Image.Image, stored_as: str) -> None:
    """The colour that a PNG's tRNS chunk names (PNG, third edition, section 11.3.1.1) goes with the samples to 8 bits.

    Pillow stretches or cuts the samples alone.
    """
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and stored_as == _RGB_16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int):
        image.info["transparency"] = clear * _STRETCHED.get(stored_as, 1)


def _samples_16(image: Image.Image) -> Pixels:
    """Gray of 16 bits. By hand, for Pillow's own conversion clips at 255 instead of scaling."""
    wide = np.asarray(image)
    gray = (wide >> 8).astype(np.uint8)
    planes = [gray, gray, gray]
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # a PNG tRNS chunk names one gray value, in 16 bits
        planes.append(np.where(wide == clear, 0, 255).astype(np.uint8))
    return np.stack(planes, axis=-1)


def has_alpha(pixels: Pixels) -> bool:
    """Whether there is an alpha plane."""
    return bool(pixels.shape[2] == 4)


def flatten(pixels: Pixels) -> Pixels:
    """RGB: what is to be seen of the picture on white. Opaque pixels keep their value bit for bit."""
    if not has_alpha(pixels):
        return pixels
    colour, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(colour)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def encode_image(
    pixels: Pixels, output_format: str, compression: int = 100, parameters: str = "", profile: bytes = b""
) -> bytes:
    """Encode a picture.

    Args:
        pixels: uint8 (H, W, 3) or (H, W, 4); JPEG has no alpha and shows the picture on white.
        output_format: png, jpeg, webp.
        compression: 0..100, quality of jpeg and webp in percent; webp at 100 is lossless. PNG always is.
        parameters: text to embed, PNG: the text chunk `parameters`; JPEG and WebP: EXIF UserComment. Empty: no metadata at all.
        profile: the ICC profile that says what the samples mean; empty: none is written, which means sRGB.
    """
    buffer = io.BytesIO()
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        if parameters:
            text = parameters.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
            chunks.add_text("parameters", text)
        Image.fromarray(pixels).save(
            buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=chunks, icc_profile=profile or None
        )
    elif output_format == "jpeg":
        Image.fromarray(flatten(pixels)).save(
            buffer,
            "JPEG",
            quality=max(1, compression),
            subsampling="4:4:4" if compression >= 90 else "4:2:0",
            exif=_user_comment(parameters, _APP1_LIMIT_BYTES),
            icc_profile=profile or None,
        )
    else:
        # exact: without it the encoder changes the colour of fully transparent pixels.
        Image.fromarray(pixels).save(
            buffer,
            "WEBP",
            lossless=compression >= 100,
            quality=0 if compression >= 100 else compression,  # of a lossless file: the effort, which is time
            method=0 if compression >= 100 else 4,
            exact=True,
            exif=_user_comment(parameters, 1 << 24),
            icc_profile=profile or None,
        )
    return buffer.getvalue()


def _user_comment(text: str, limit_bytes: int) -> bytes:
    """An EXIF block with nothing but a UserComment (EXIF 2.32 section 4.6.5: an 8-byte character code, then the text)."""
    if not text:
        return b""
    encoded = text.encode("utf-16-be", "replace")[: limit_bytes // 2 * 2]
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + encoded
    return exif.tobytes()
