"""The meaning of samples: kept as an ICC profile or converted to sRGB, never dropped in silence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ovserve.errors import ImageError
from ovserve.pixels.colour import MAX_KEPT_PROFILE_BYTES, MAX_PROFILE_BYTES
from ovserve.pixels.images import Limits, Pixels, decode_image, extract_colour_profile
from tests.pngs import chunk, png_file

CASES = Path(__file__).parent.parent / "data" / "cases"
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RAMP: Pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS: Pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
SRGB_CHRM = (31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)
BT2020_CHRM = (31_270, 32_900, 70_800, 29_200, 17_000, 79_700, 13_100, 4_600)


def decoded(data: bytes) -> Pixels:
    return decode_image(data, "image", Limits(10**6, 10**4))


def gama(gamma: float) -> bytes:
    return chunk(b"gAMA", round(gamma * 100_000).to_bytes(4, "big"))


def chrm(values: tuple[int, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *values))


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"name\0\0" + zlib.compress(profile))


def gray_profile(gamma: float = 1.0) -> bytes:
    """Return an ICC profile (version 2, ICC.1:2001-04) for gray of one gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63_190, 65_536, 54_061)
    text = b"text" + bytes(4) + b"none\0\0\0\0"
    described = b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(78)
    tags, body, at = [], b"", 128 + 4 + 4 * 12
    for name, content in ((b"desc", described), (b"cprt", text), (b"wtpt", white), (b"kTRC", curve)):
        padded = content + bytes(-len(content) % 4)
        tags.append(name + struct.pack(">II", at + len(body), len(content)))
        body += padded
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63_190, 65_536, 54_061)
    return head.ljust(128, b"\0") + struct.pack(">I", 4) + b"".join(tags) + body


def test_gamma_is_converted_to_srgb() -> None:
    assert (decoded((CASES / "gama1.png").read_bytes())[8, 8] == 137).all()
    found = decoded(png_file(RAMP, 8, 0, gama(1.0)))[..., 0].astype(int)
    light = RAMP / 255
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize("gamma", [0.45455, 0.45, 0.46])
def test_usual_gamma_stands_for_srgb_bit_for_bit(gamma: float) -> None:
    assert np.array_equal(decoded(png_file(COLOURS, 8, 2, gama(gamma), chrm(SRGB_CHRM))), COLOURS)


@pytest.mark.parametrize(("planes", "colour_type"), [(3, 2), (4, 6)])
def test_dark_colours_of_16_bits_are_converted_from_all_bits(planes: int, colour_type: int) -> None:
    samples = np.full((2, 2, planes), 128)  # half of the first of 255 levels
    found = decoded(png_file(samples, 16, colour_type, gama(1.0)))
    assert (found[..., :3] == round(128 / 65_535 * 12.92 * 255)).all()


def test_chromaticities_without_gamma_do_not_count() -> None:
    assert np.array_equal(decoded(png_file(COLOURS, 8, 2, chrm(BT2020_CHRM))), COLOURS)


def test_alpha_and_transparent_colours_are_not_converted() -> None:
    rgba = np.dstack([COLOURS, RAMP])
    found = decoded(png_file(rgba, 8, 6, gama(1.0)))
    assert np.array_equal(found[..., 3], RAMP)
    clear = decoded(png_file(RAMP, 8, 0, gama(1.0), chunk(b"tRNS", b"\0\x40")))
    assert np.argwhere(clear[..., 3] == 0).tolist() == [[4, 0]]


def test_chromaticities_are_converted_to_srgb() -> None:
    found = decoded(png_file(COLOURS, 8, 2, gama(0.45455), chrm(BT2020_CHRM)))
    gray = decoded(png_file(np.repeat(RAMP[..., None], 3, 2), 8, 2, gama(0.45455), chrm(BT2020_CHRM)))
    assert np.ptp(gray.astype(int), axis=2).max() <= 1
    assert np.abs(gray[..., 0].astype(int) - RAMP).max() <= 10  # a power of 2.2 is darker than sRGB near black
    assert np.abs(found.astype(int) - COLOURS).max() > 30


@pytest.mark.parametrize("profile", [SRGB_PROFILE, SRGB_PROFILE + bytes(100_000)])
def test_rgb_profile_is_kept_and_comes_before_gamma(profile: bytes) -> None:
    data = png_file(COLOURS, 8, 2, gama(1.0), chrm(BT2020_CHRM), iccp(profile))
    assert extract_colour_profile(data) == profile
    assert np.array_equal(decoded(data), COLOURS)


def test_srgb_chunk_comes_before_gamma() -> None:
    data = png_file(COLOURS, 8, 2, gama(1.0), chrm(BT2020_CHRM), chunk(b"sRGB", b"\0"))
    assert np.array_equal(decoded(data), COLOURS)


def test_code_points_come_before_a_profile() -> None:
    data = png_file(COLOURS, 8, 2, gama(1.0), iccp(SRGB_PROFILE), chunk(b"cICP", bytes((1, 13, 0, 1))))
    assert np.array_equal(decoded(data), COLOURS)
    assert extract_colour_profile(data) == b""
    linear = png_file(COLOURS, 8, 2, chunk(b"cICP", bytes((1, 8, 0, 1))))
    assert np.array_equal(decoded(linear), decoded(png_file(COLOURS, 8, 2, gama(1.0))))


@pytest.mark.parametrize("codes", [(9, 16), (9, 18)])
def test_reference_white_of_high_dynamic_range_is_white(codes: tuple[int, int]) -> None:
    white = 148 if codes[1] == 16 else 191  # 58 % of PQ and 75 % of HLG: ITU-R BT.2408-7 table 1
    found = decoded(png_file(np.full((2, 2, 3), white), 8, 2, chunk(b"cICP", bytes((*codes, 0, 1)))))
    assert found.min() >= 250


def test_narrow_range_is_expanded() -> None:
    levels = np.array([[[16, 16, 16], [235, 235, 235], [0, 0, 0], [255, 255, 255]]])
    found = decoded(png_file(levels, 8, 2, chunk(b"cICP", bytes((1, 13, 0, 0)))))
    assert found[0, :, 0].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("codes", [(0, 13), (1, 0), (22, 13), (1, 9), (200, 200)])
def test_unsupported_code_points_are_refused(codes: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="not supported; send the image in sRGB"):
        decoded(png_file(COLOURS, 8, 2, chunk(b"cICP", bytes((*codes, 0, 1)))))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_gray_profile_is_converted(form: str) -> None:
    buffer = io.BytesIO()
    options = {"quality": 100} if form == "JPEG" else {}
    Image.fromarray(np.full((16, 16), 64, np.uint8)).save(buffer, form, icc_profile=gray_profile(), **options)
    assert np.abs(decoded(buffer.getvalue())[8, 8].astype(int) - 137).max() <= 1
    assert extract_colour_profile(buffer.getvalue()) == b""


def test_gray_profile_keeps_the_alpha() -> None:
    samples = np.dstack([np.full((16, 16), 64, np.uint8), RAMP])
    found = decoded(png_file(samples, 8, 4, iccp(gray_profile())))
    assert np.array_equal(found[..., 3], RAMP)
    assert np.abs(found[..., :3].astype(int) - 137).max() <= 1


def test_profile_too_large_to_keep_is_converted() -> None:
    swapped = ImageCms.createProfile("sRGB")
    profile = ImageCms.ImageCmsProfile(swapped).tobytes() + bytes(MAX_KEPT_PROFILE_BYTES)
    for form in ("PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        options = {"lossless": True} if form == "WEBP" else {}
        Image.fromarray(COLOURS).save(buffer, form, icc_profile=profile, **options)
        assert extract_colour_profile(buffer.getvalue()) == b""
        assert np.abs(decoded(buffer.getvalue()).astype(int) - COLOURS).max() <= 1


def test_profile_that_inflates_without_end_is_refused() -> None:
    data = png_file(COLOURS, 8, 2, iccp(bytes(MAX_PROFILE_BYTES + 1)))
    with pytest.raises(ImageError, match=f"the ICC profile is larger than {MAX_PROFILE_BYTES} bytes"):
        decoded(data)


@pytest.mark.parametrize(
    "profile", [b"", b"short", SRGB_PROFILE[:200], SRGB_PROFILE[:16] + b"CMYK" + SRGB_PROFILE[20:]]
)
def test_damaged_or_foreign_profile_does_not_refuse_intact_pixels(profile: bytes) -> None:
    assert np.array_equal(decoded(png_file(COLOURS, 8, 2, iccp(profile))), COLOURS)
    if profile[36:40] != b"acsp":  # then the gamma counts, as in browsers
        linear = decoded(png_file(COLOURS, 8, 2, gama(1.0)))
        assert np.array_equal(decoded(png_file(COLOURS, 8, 2, gama(1.0), iccp(profile))), linear)
    cut = chunk(b"iCCP", b"name\0\0" + zlib.compress(SRGB_PROFILE)[:50])
    assert np.array_equal(decoded(png_file(COLOURS, 8, 2, cut)), COLOURS)
