"""Decodes image files to uint8 arrays and encodes arrays to image files.

Arrays are `uint8 (H, W, 3)`, RGB, or `uint8 (H, W, 4)`, RGBA with unassociated alpha, 0..255, upright (orientation
applied). Runs in: the decoding process (`ovserve.pixels.decoder`) and, for files whose cost is known, the worker.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ovserve.errors import ImageError

__all__ = [
    "FORMATS",
    "Limits",
    "Pixels",
    "check_size",
    "decode_image",
    "encode_image",
    "extract_colour_profile",
    "flatten",
    "has_alpha",
]

Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # any other decoder would only add attack surface
PNG_COMPRESS_LEVEL = 1  # measured at 512 and 1024 px: level 6 takes 1.3 to 5 times as long for 7 to 20 % fewer bytes
_ORIENTATION = 0x0112  # TIFF and EXIF tag
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_MAX_PROFILE_BYTES = 1 << 20  # profiles of displays and cameras have 0.5 to 600 kB
# Pillow's names for the stored samples of a PNG.
_RGB_16 = "RGB;16B"
_GRAY_FACTORS = {"L;2": 85, "L;4": 17}  # gray of 2 and 4 bits: the factor to 8 bits
_MAX_JPEG_COMMENT_BYTES = 65_000  # a JPEG segment holds 65533 bytes; the EXIF structure takes some of them
_MAX_WEBP_COMMENT_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest accepted image, checked by its header before any pixel is decoded."""

    pixels: int
    side_px: int


def decode_image(data: bytes | memoryview, name: str, limits: Limits) -> Pixels:
    """Decode the first frame of an image file, upright, as RGB, or as RGBA where it has transparency.

    16-bit samples keep their high byte. Colour profiles are not applied: the samples come back as they are stored, and
    `extract_colour_profile` returns the profile that defines them.

    Args:
        data: the file's bytes.
        name: the field to name in an error: `image`, `image[1]`, `mask`.
        limits: the largest accepted image.

    Raises:
        ImageError: not in one of FORMATS, damaged, truncated, too large, or of samples without an 8-bit equivalent.
    """
    data = bytes(data)  # one copy here: BytesIO shares bytes, but copies a memoryview each time
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, name, limits)
            if image.format == "PNG":
                image.verify()  # checksums; the decoder alone accepts a file that is truncated in its last chunk
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            stored_as = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""  # gone after load
            image.load()
            _scale_transparent_colour(image, stored_as)
            # Read the orientation after load: the TIFF reader applies it itself and drops the tag.
            return _apply_orientation(_to_pixels(image, name), _read_orientation(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - anything a decoder raises on malformed bytes is an error of the file
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ImageError(
            f"{name}: not a readable PNG, JPEG, WebP, GIF, BMP or TIFF image{detail}"[:300], param=name
        ) from None


def extract_colour_profile(data: bytes | memoryview) -> bytes:
    """Return the ICC profile of an image file, for results that contain its pixels; empty when there is none to keep.

    Only a profile for RGB is kept: one of another colour space (CMYK, gray) does not describe the RGB samples that
    `decode_image` returns.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        profile: bytes = image.info.get("icc_profile") or b""
    # ICC.1:2022, 7.2: bytes 16 to 19 of the 128-byte header hold the colour space of the data.
    is_rgb = len(profile) > 128 and profile[16:20] == b"RGB "
    return profile if is_rgb and len(profile) <= _MAX_PROFILE_BYTES else b""


def check_size(width: int, height: int, name: str, limits: Limits) -> None:
    """Raise ImageError for an image without pixels, or larger than the limits."""
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels", param=name)
    if width * height > limits.pixels or max(width, height) > limits.side_px:
        raise ImageError(
            f"{name}: {width}x{height} is too large; at most {limits.pixels} pixels and {limits.side_px} px on a side",
            param=name,
        )


def _read_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged metadata must not reject intact pixels: use them as stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _apply_orientation(pixels: Pixels, orientation: int) -> Pixels:
    """Turn the picture upright (EXIF 2.32, tag Orientation: where row 0 and column 0 of the stored picture are)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_pixels(image: Image.Image, name: str) -> Pixels:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _gray_16_to_pixels(image)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: 32-bit samples have no defined white level; send 8 or 16 bits", param=name)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))  # convert() to the same mode would copy


def _scale_transparent_colour(image: Image.Image, stored_as: str) -> None:
    """Scale the colour of a PNG's tRNS chunk (PNG, third edition, section 11.3.1.1) to 8 bits, like the samples.

    Pillow scales the samples only.
    """
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and stored_as == _RGB_16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int):
        image.info["transparency"] = clear * _GRAY_FACTORS.get(stored_as, 1)


def _gray_16_to_pixels(image: Image.Image) -> Pixels:
    """Convert 16-bit gray; Pillow's own conversion clips at 255 instead of scaling."""
    wide = np.asarray(image)
    gray = (wide >> 8).astype(np.uint8)
    planes = [gray, gray, gray]
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # a PNG tRNS chunk holds one gray value, of 16 bits
        planes.append(np.where(wide == clear, 0, 255).astype(np.uint8))
    return np.stack(planes, axis=-1)


def has_alpha(pixels: Pixels) -> bool:
    """Return whether the array has an alpha plane."""
    return bool(pixels.shape[2] == 4)


def flatten(pixels: Pixels) -> Pixels:
    """Composite over white; return RGB. Opaque pixels keep their value bit for bit."""
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
        pixels: uint8 (H, W, 3) or (H, W, 4); JPEG has no alpha: the picture is composited over white.
        output_format: png, jpeg, webp.
        compression: 0..100, quality of jpeg and webp in percent; webp at 100 is lossless. PNG is always lossless.
        parameters: text to embed. PNG: the text chunk `parameters`; JPEG and WebP: EXIF UserComment. Empty: no text.
        profile: the ICC profile of the samples; empty: none is written, which means sRGB.
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
            exif=_user_comment(parameters, _MAX_JPEG_COMMENT_BYTES),
            icc_profile=profile or None,
        )
    else:
        # exact: without it the encoder changes the colour of fully transparent pixels.
        Image.fromarray(pixels).save(
            buffer,
            "WEBP",
            lossless=compression >= 100,
            quality=0 if compression >= 100 else compression,  # for lossless this is the effort, thus the time
            method=0 if compression >= 100 else 4,
            exact=True,
            exif=_user_comment(parameters, _MAX_WEBP_COMMENT_BYTES),
            icc_profile=profile or None,
        )
    return buffer.getvalue()


def _user_comment(text: str, limit_bytes: int) -> bytes:
    """Return an EXIF block with only a UserComment (EXIF 2.32 section 4.6.5: 8-byte character code, then the text)."""
    if not text:
        return b""
    encoded = text.encode("utf-16-be", "replace")[: limit_bytes // 2 * 2]
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + encoded
    return exif.tobytes()
