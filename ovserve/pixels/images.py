"""Decodes image files to uint8 arrays and encodes arrays to image files.

Arrays are `uint8 (H, W, 3)`, RGB, or `uint8 (H, W, 4)`, RGBA with unassociated alpha, 0..255, upright (orientation
applied). Runs in: the decoding process (`ovserve.pixels.decoder`) and, for files whose cost is known, the worker.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from ovserve.errors import ImageError
from ovserve.pixels.avif import avif_codes
from ovserve.pixels.colour import (
    MAX_KEPT_PROFILE_BYTES,
    SRGB,
    convert_icc,
    convert_space,
    icc_kind,
    png_profile,
    png_space,
    space_of_codes,
)
from ovserve.pixels.heic import FORMAT as HEIF
from ovserve.pixels.heic import reads_heic, register_heic
from ovserve.pixels.png import SIGNATURE, Png, read_png
from ovserve.pixels.png_writer import write_png
from ovserve.pixels.tiff import gray_levels, prepare_tiff

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
Box = tuple[int, int, int, int]  # left, top, right, bottom

# Any other decoder would only add attack surface. Pillow may be built without AVIF; HEIC needs another package.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"),
    *(("AVIF",) if features.check("avif") else ()),
    *((HEIF,) if reads_heic() else ()),
)
if HEIF in FORMATS:
    register_heic()
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each has a stack, and the memory of a decoding process is limited
_ORIENTATION = 0x0112  # TIFF and EXIF tag
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_GRAY_FACTORS = {2: 85, 4: 17}  # gray of 2 and 4 bits: the factor to 8 bits
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_WEBP_CHUNKS = 64  # read at most; before the first frame are three: the header, an ICC profile, the animation's options
_MAX_JPEG_COMMENT_BYTES = 65_000  # a JPEG segment holds 65533 bytes; the EXIF structure takes some of them
_MAX_WEBP_COMMENT_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest accepted image, checked by its header before any pixel is decoded."""

    pixels: int
    side_px: int


def decode_image(data: bytes | memoryview, name: str, limits: Limits) -> Pixels:
    """Decode the first frame of an image file, upright, as RGB, or as RGBA where it has transparency.

    16-bit samples keep their high byte. The samples come back as they are stored if they are in sRGB, or if
    `extract_colour_profile` returns the profile that defines them; else they are converted to sRGB.

    Args:
        data: the file's bytes.
        name: the field to name in an error: `image`, `image[1]`, `mask`.
        limits: the largest accepted image.

    Raises:
        ImageError: not in one of FORMATS, damaged, truncated, too large, or of samples without an 8-bit equivalent.
    """
    data = bytes(data)  # one copy here: BytesIO shares bytes, but copies a memoryview each time
    try:
        png = read_png(data) if data.startswith(SIGNATURE) else None
        with Image.open(io.BytesIO(png.stream if png else data), formats=FORMATS) as image:
            check_size(*image.size, name, limits)
            # Its orientation does not count, as in browsers; the TIFF reader would apply it.
            image.info.pop("xmp", None)
            if isinstance(image, TiffImageFile):
                prepare_tiff(image)
            box = _first_frame_box(image, data)
            image.load()
            # Read the orientation after load: the TIFF reader applies it itself and drops the tag.
            pixels = _clear_outside(_to_srgb(image, png, name), box)
            if image.format in ("AVIF", HEIF) and not _profile(image, png) and (codes := avif_codes(data)):
                pixels = convert_space(pixels, space_of_codes(codes) or SRGB)
            return _apply_orientation(pixels, _read_orientation(image, png))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - anything a decoder raises on malformed bytes is an error of the file
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ImageError(
            f"{name}: not a readable PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF image{detail}"[:300], param=name
        ) from None


def extract_colour_profile(data: bytes | memoryview) -> bytes:
    """Return the ICC profile of an image file, for results that contain its pixels; empty when there is none to keep.

    Only a profile for RGB of a size that each result can carry is kept: with every other meaning of the samples
    `decode_image` converts them to sRGB.
    """
    data = bytes(data)
    if data.startswith(SIGNATURE):
        profile = png_profile(read_png(data, needs_pixels=False))
        return profile if _is_kept(profile, "") else b""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        profile = _profile(image, None)
        return profile if _is_kept(profile, image.mode) else b""


def _profile(image: Image.Image, png: Png | None) -> bytes:
    profile: bytes = png_profile(png) if png else image.info.get("icc_profile") or b""
    return profile


def _is_kept(profile: bytes, mode: str) -> bool:
    return icc_kind(profile) == "RGB" and len(profile) <= MAX_KEPT_PROFILE_BYTES and mode != "CMYK"


def check_size(width: int, height: int, name: str, limits: Limits) -> None:
    """Raise ImageError for an image without pixels, or larger than the limits."""
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels", param=name)
    if width * height > limits.pixels or max(width, height) > limits.side_px:
        raise ImageError(
            f"{name}: {width}x{height} is too large; at most {limits.pixels} pixels and {limits.side_px} px on a side",
            param=name,
        )


def _first_frame_box(image: ImageFile.ImageFile, data: bytes) -> Box | None:
    """Return left, top, right, bottom of the first frame of a GIF or WebP animation; None if it fills the picture."""
    box: Box = (0, 0, *image.size)
    if image.format == "GIF" and image.tile:
        left, top, right, bottom = image.tile[0].extents or box
        box = (int(left), int(top), int(right), int(bottom))
    elif image.format == "WEBP" and (at := _find_webp_frame(data)):
        # RFC 9649 section 2.7.1.1: offsets in units of two pixels, sizes minus one, 24 bits each.
        left, top, width, height = (int.from_bytes(data[at + 3 * k : at + 3 * k + 3], "little") for k in range(4))
        box = (2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1)
    return None if box == (0, 0, *image.size) else box


def _find_webp_frame(data: bytes) -> int:
    """Return the offset of the content of the first ANMF chunk of a WebP file; 0 if the file is no animation."""
    at = 12
    for _ in range(_WEBP_CHUNKS):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"ANMF":
            return at + 8
        if len(kind) < 4 or kind in (b"VP8 ", b"VP8L"):
            break
        at += 8 + size + size % 2
    return 0


def _clear_outside(pixels: Pixels, box: Box | None) -> Pixels:
    """Return the picture with alpha 0 outside the box, where an animation's first frame leaves it unpainted."""
    if box is None:
        return pixels
    left, top, right, bottom = box
    cleared = np.zeros((*pixels.shape[:2], 4), np.uint8)
    inside = cleared[top:bottom, left:right]
    inside[..., 3] = 255
    inside[..., : pixels.shape[2]] = pixels[top:bottom, left:right]
    return cleared


def _read_orientation(image: Image.Image, png: Png | None) -> int:
    exif: Image.Exif = Image.Exif()
    try:
        if image.format == "TIFF":
            exif = image.getexif()
        elif stored := png.ancillary.get(b"eXIf") if png else image.info.get("exif"):
            exif.load(stored)  # not getexif, which looks in XMP too, in JPEG already when the file is opened
        value = exif.get(_ORIENTATION, 1)
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


def _to_srgb(image: Image.Image, png: Png | None, name: str) -> Pixels:
    """Return the pixels of a loaded image, in sRGB or in the space of a profile that is kept."""
    profile = _profile(image, png)
    if _is_kept(profile, image.mode):
        return _to_pixels(image, png, name)
    kind = icc_kind(profile)
    if kind == "CMYK" and image.mode == "CMYK":
        return _to_pixels(convert_icc(image, profile), png, name)
    if kind == "GRAY" and image.mode in _GRAY_MODES:
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        levels = np.asarray(convert_icc(ramp, profile).convert("RGB"))[0]
        pixels = _to_pixels(image, png, name)
        return np.dstack([levels[pixels[..., 0]], pixels[..., 3:]])
    pixels = _to_pixels(image, png, name)
    if kind == "RGB" and image.mode != "CMYK":
        converted = np.asarray(convert_icc(Image.fromarray(pixels[..., :3]), profile))
        return np.dstack([converted, pixels[..., 3:]])
    if not png or profile or (space := png_space(png)) == SRGB:
        return pixels
    is_wide = png.depth == 16 and png.colour_type in (2, 6)
    return convert_space(pixels, space, _low_bytes(png) if is_wide else None)


def _to_pixels(image: Image.Image, png: Png | None, name: str) -> Pixels:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _gray_16_to_pixels(image)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: 32-bit samples have no defined white level; send 8 or 16 bits", param=name)
    if png:
        _scale_transparent_colour(image, png)
        if png.depth == 16 and isinstance(image.info.get("transparency"), tuple):
            return np.dstack([np.asarray(image), _alpha_of_wide_colour(image, png)])
    if image.mode == "La":  # premultiplied; Pillow converts it to nothing else
        image = image.convert("LA")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))  # convert() to the same mode would copy


def _scale_transparent_colour(image: Image.Image, png: Png) -> None:
    """Scale the gray of a PNG's tRNS chunk (third edition, section 11.3.1.1) to 8 bits, like the samples.

    Pillow scales the samples only.
    """
    clear = image.info.get("transparency")
    if isinstance(clear, int) and png.colour_type == 0:
        image.info["transparency"] = clear * _GRAY_FACTORS.get(png.depth, 1)


def _alpha_of_wide_colour(image: Image.Image, png: Png) -> Pixels:
    """Return the alpha of an RGB PNG of 16-bit samples: 0 where all 16 bits equal the colour of its tRNS chunk.

    Pillow decodes only the high bytes.
    """
    clear = np.array(image.info["transparency"])
    is_clear = (np.asarray(image) == clear >> 8).all(-1)
    if is_clear.any():
        is_clear &= (_low_bytes(png) == clear & 255).all(-1)
    return np.where(is_clear, 0, 255).astype(np.uint8)


def _low_bytes(png: Png) -> Pixels:
    """Return the low bytes of the colour of an RGB or RGBA PNG of 16-bit samples: uint8 (H, W, 3).

    Pillow decodes the high bytes. Read as little-endian samples, the file gives the low ones.
    """
    with Image.open(io.BytesIO(png.stream), formats=("PNG",)) as image:
        image.tile = [image.tile[0]._replace(args=f"{image.mode};16L")]
        return np.asarray(image)[..., :3]


def _gray_16_to_pixels(image: Image.Image) -> Pixels:
    """Convert 16-bit gray; Pillow's own conversion clips at 255 instead of scaling."""
    wide = gray_levels(image, np.asarray(image))
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
    if output_format == "png":
        return write_png(pixels, parameters, profile)
    buffer = io.BytesIO()
    if output_format == "jpeg":
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
