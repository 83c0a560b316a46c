"""The colour space of an image's samples, and the conversion to sRGB of those that a result cannot carry along.

A result has the source's samples and an ICC profile for RGB, if the source has one. All else that gives samples a
meaning is converted here: gamma, chromaticities and code points (PNG's gAMA, cHRM, cICP; AVIF's nclx), ICC profiles for
gray or CMYK, and profiles too large to repeat in each result. Runs in: worker.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from ovserve.pixels.png import Png

__all__ = [
    "MAX_KEPT_PROFILE_BYTES",
    "SRGB",
    "Codes",
    "Space",
    "convert_icc",
    "convert_space",
    "icc_kind",
    "png_profile",
    "png_space",
    "space_of_codes",
]

Pixels = NDArray[np.uint8]
Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # stored sample 0..1 to linear light, 1 = white
Primaries = tuple[float, float, float, float, float, float, float, float]  # x, y of white, red, green, blue

MAX_KEPT_PROFILE_BYTES = 1 << 20  # profiles of displays and cameras have 0.5 to 600 kB
MAX_PROFILE_BYTES = 1 << 24  # read at all: profiles of printers have up to 4 MB
STRIP_ROWS = 256  # rows converted at a time: the intermediate arrays take many times the bytes of the picture
_GAMMA_TOLERANCE = 0.05  # as in libpng (PNG_GAMMA_THRESHOLD): 0.4545 stands for sRGB
_PRIMARIES_TOLERANCE = 0.002
_STEPS = 4096  # of linear light in the table that encodes to sRGB, on the scale of a square root
_REFERENCE_WHITE_NITS = 203  # ITU-R BT.2408-7 section 2.2: the level of diffuse white in PQ and HLG

_SRGB_PRIMARIES: Primaries = (0.3127, 0.3290, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)


@dataclass(frozen=True, slots=True)
class Space:
    """An RGB colour space.

    Attributes:
        curve: None for sRGB's.
        primaries: None for sRGB's.
        is_narrow: black is stored as 16 and white as 235 (ITU-R BT.709-6 section 3).
    """

    curve: Curve | None = None
    primaries: Primaries | None = None
    is_narrow: bool = False


@dataclass(frozen=True, slots=True)
class Codes:
    """Code points of ITU-T H.273: primaries (table 2), transfer characteristics (table 3), and full range or not."""

    primaries: int
    transfer: int
    is_full: bool = True


SRGB = Space()


# --- transfer functions -----------------------------------------------------------------------------------------------


def _gamma(exponent: float) -> Curve:
    return lambda stored: stored**exponent


def _pq(stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084 section 5.1, scaled to reference white."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = stored ** (1 / m2)
    return 10_000 / _REFERENCE_WHITE_NITS * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _hlg(stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """ITU-R BT.2100-2 table 5, for each channel, with the system gamma of 1000 nits, scaled to reference white."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(stored <= 0.5, stored**2 / 3, (np.exp((stored - c) / a) + b) / 12)
    return 1000 / _REFERENCE_WHITE_NITS * scene**1.2


# Pictures in BT.709, BT.601 and BT.2020 are made for displays of gamma 2.4 (ITU-R BT.1886 annex 1).
_CURVES: dict[int, Curve | None] = {
    1: _gamma(2.4),
    4: _gamma(2.2),
    5: _gamma(2.8),
    6: _gamma(2.4),
    8: _gamma(1.0),
    13: None,
    14: _gamma(2.4),
    15: _gamma(2.4),
    16: _pq,
    18: _hlg,
}
_CODED_PRIMARIES: dict[int, Primaries | None] = {
    1: None,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_UNSPECIFIED = 2


def space_of_codes(codes: Codes) -> Space | None:
    """Return the space of code points; None if they leave it open.

    Raises:
        ValueError: the code points are not supported.
    """
    if codes.transfer == _UNSPECIFIED and codes.primaries == _UNSPECIFIED:
        return None
    transfer = 13 if codes.transfer == _UNSPECIFIED else codes.transfer
    primaries = 1 if codes.primaries == _UNSPECIFIED else codes.primaries
    if transfer not in _CURVES or primaries not in _CODED_PRIMARIES:
        raise ValueError(
            f"colour primaries {primaries} with transfer characteristics {transfer} (ITU-T H.273) are not supported; "
            "send the image in sRGB"
        )
    return Space(_CURVES[transfer], _CODED_PRIMARIES[primaries], not codes.is_full)


# --- PNG --------------------------------------------------------------------------------------------------------------


def png_profile(png: Png) -> bytes:
    """Return the ICC profile of a PNG; empty if it has none that counts (section 4.3: cICP comes before iCCP).

    Raises:
        ValueError: the profile is larger than MAX_PROFILE_BYTES.
    """
    stored = png.ancillary.get(b"iCCP", b"")
    if b"cICP" in png.ancillary or not stored:
        return b""
    _, _, rest = stored.partition(b"\0")
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(rest[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""  # as in browsers: a damaged profile does not count
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"the ICC profile is larger than {MAX_PROFILE_BYTES} bytes")
    return profile if inflater.eof and icc_kind(profile) else b""


def png_space(png: Png) -> Space:
    """Return the space that cICP, sRGB, gAMA and cHRM declare; sRGB without any.

    Raises:
        ValueError: the code points of cICP are not supported.
    """
    chunks = png.ancillary
    if len(cicp := chunks.get(b"cICP", b"")) == 4:
        space = space_of_codes(Codes(cicp[0], cicp[1], is_full=bool(cicp[3])))
        if space is not None:
            return space
    if b"sRGB" in chunks:
        return SRGB
    gama = chunks.get(b"gAMA", b"")
    gamma = int.from_bytes(gama, "big") / 100_000
    if len(gama) != 4 or not gamma:
        return SRGB  # as in browsers: chromaticities without a gamma do not count
    primaries = _png_primaries(chunks.get(b"cHRM", b""))
    if primaries is None and abs(gamma * 2.2 - 1) <= _GAMMA_TOLERANCE:
        return SRGB
    return Space(_gamma(1 / gamma), primaries)


def _png_primaries(chrm: bytes) -> Primaries | None:
    if len(chrm) != 32:
        return None
    values = tuple(value / 100_000 for value in struct.unpack(">8I", chrm))
    near = all(abs(a - b) <= _PRIMARIES_TOLERANCE for a, b in zip(values, _SRGB_PRIMARIES, strict=True))
    if near or not all(0 < y <= 1 for y in values[1::2]):
        return None
    return values


# --- conversion -------------------------------------------------------------------------------------------------------


def convert_space(pixels: Pixels, space: Space, low: Pixels | None = None) -> Pixels:
    """Return the picture in sRGB, with its alpha; the same array if it is in sRGB. Colours outside sRGB are clipped.

    Args:
        pixels: uint8 (H, W, 3 or 4).
        space: the space of the samples.
        low: uint8 (H, W, 3), the low bytes of samples of 16 bits, of which `pixels` has the high ones.
    """
    if space == SRGB:
        return pixels
    linear = _linear_levels(space, 256 if low is None else 65_536)
    encoded = np.floor(_encode_srgb(linear) * 255 + 0.5).astype(np.uint8)
    table = np.floor(_encode_srgb((np.arange(_STEPS + 1) / _STEPS) ** 2) * 255 + 0.5).astype(np.uint8)
    levels = linear.astype(np.float32)
    matrix = None
    if space.primaries is not None:
        matrix = (_to_xyz(_SRGB_PRIMARIES, inverse=True) @ _to_xyz(space.primaries)).astype(np.float32)
    converted = pixels.copy()
    for top in range(0, len(pixels), STRIP_ROWS):
        strip = slice(top, top + STRIP_ROWS)
        stored: NDArray[Any] = pixels[strip, :, :3]
        if low is not None:
            stored = stored.astype(np.uint16) << 8 | low[strip]
        if matrix is None:
            converted[strip, :, :3] = encoded[stored]
            continue
        light = levels[stored] @ matrix.T
        np.sqrt(np.clip(light, 0, 1, out=light), out=light)
        converted[strip, :, :3] = table[(light * _STEPS + 0.5).astype(np.intp)]
    return converted


def _linear_levels(space: Space, count: int) -> NDArray[np.float64]:
    """Return linear light for each of the stored levels."""
    stored = np.arange(count) / (count - 1)
    if space.is_narrow:
        stored = np.clip((stored * 255 - 16) / 219, 0, 1)
    if space.curve is not None:
        return space.curve(stored)
    return np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)


def _encode_srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Encode linear light (IEC 61966-2-1 section 4.3)."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _to_xyz(primaries: Primaries, *, inverse: bool = False) -> NDArray[np.float64]:
    """Return the matrix from linear RGB to CIE XYZ, adapted to sRGB's white, or its inverse.

    SMPTE RP 177 section 3.3; the white is adapted with the Bradford matrix (ICC.1:2022 annex E).
    """
    points = np.array(primaries).reshape(4, 2)
    xyz = np.stack([points[:, 0] / points[:, 1], np.ones(4), (1 - points.sum(1)) / points[:, 1]])
    white, columns = xyz[:, 0], xyz[:, 1:]
    matrix = columns * np.linalg.solve(columns, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    x, y = _SRGB_PRIMARIES[:2]
    target = np.array([x / y, 1, (1 - x - y) / y])
    scale = (bradford @ target) / (bradford @ white)
    adapted = np.linalg.solve(bradford, scale[:, None] * bradford) @ matrix
    return np.linalg.inv(adapted) if inverse else adapted


def icc_kind(profile: bytes) -> str:
    """Return the colour space that an ICC profile describes (RGB, GRAY, CMYK, Lab ...); empty if it is no profile."""
    # ICC.1:2022, 7.2: bytes 16 to 19 of the 128-byte header hold the colour space of the data.
    return profile[16:20].decode("latin-1").strip() if len(profile) > 128 and profile[36:40] == b"acsp" else ""


def convert_icc(image: Image.Image, profile: bytes) -> Image.Image:
    """Return an image of mode L, RGB or CMYK in sRGB, as RGB; the same image if the profile cannot be used.

    Browsers ignore such profiles too.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
            flags=ImageCms.Flags.NOOPTIMIZE,  # the optimised tables are coarse in the dark of steep curves
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if found is None else found
