"""Encoded bytes to arrays and back."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from ovserve.errors import ImageError
from ovserve.pixels.images import (
    FORMATS,
    Limits,
    Pixels,
    colour_profile,
    decode_image,
    encode_image,
    flatten,
    has_alpha,
)

LIMITS = Limits(pixels=1_000_000, side_px=2_000)
NOISE = np.random.default_rng(7)
RGB: Pixels = NOISE.integers(0, 256, (30, 40, 3), np.uint8)
RGBA: Pixels = NOISE.integers(0, 256, (30, 40, 4), np.uint8)
WIDE = NOISE.integers(0, 65_536, (5, 7, 4))
SMOOTH: Pixels = np.asarray(Image.fromarray(NOISE.integers(0, 256, (4, 5, 3), np.uint8)).resize((40, 30)))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_16(samples: NDArray[np.int64], colour_type: int, clear: bytes = b"") -> bytes:
    """A PNG of 16-bit samples by hand; Pillow writes none."""
    height, width = samples.shape[:2]
    rows = [row.astype(">u2").tobytes() for row in samples]
    return png_of(width, height, 16, colour_type, rows, clear)


def png_of(width: int, height: int, depth: int, colour_type: int, lines: list[bytes], clear: bytes = b"") -> bytes:
    """A PNG by hand (PNG specification, 5.3 and 11.2): its rows as they are stored, and what its tRNS chunk says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + line for line in lines)
    clear = chunk(b"tRNS", clear) if clear else b""
    body = chunk(b"IHDR", head) + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def decoded(data: bytes, name: str = "image") -> Pixels:
    pixels = decode_image(data, name, LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels


# --- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_come_back_bit_for_bit(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(decoded(encoded(Image.fromarray(RGB), form, **options)), RGB)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_alpha_and_the_colour_under_it_come_back_bit_for_bit(form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert np.array_equal(decoded(encoded(Image.fromarray(RGBA), form, **options)), RGBA)


@pytest.mark.parametrize("form", ["JPEG", "GIF"])
def test_lossy_formats_come_close(form: str) -> None:
    pixels = decoded(encoded(Image.fromarray(SMOOTH), form))
    assert pixels.shape == SMOOTH.shape
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_gray_and_palette_become_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_gray_with_alpha_becomes_rgba() -> None:
    image = Image.fromarray(RGBA).convert("LA")
    assert np.array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGBA")))


def test_a_palette_with_a_transparent_entry_becomes_rgba() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 2), 1)
    pixels = decoded(encoded(image, "PNG", transparency=1))
    assert pixels[2, 1].tolist() == [40, 50, 60, 0]
    assert pixels[0, 0].tolist() == [10, 20, 30, 255]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_print_and_video_colours_become_rgb(mode: str) -> None:
    pixels = decoded(encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 6


@pytest.mark.parametrize(("planes", "colour_type"), [(3, 2), (4, 6)])
def test_16_bit_colour_keeps_its_high_byte(planes: int, colour_type: int) -> None:
    assert np.array_equal(decoded(png_16(WIDE[..., :planes], colour_type)), WIDE[..., :planes] >> 8)


def test_16_bit_gray_keeps_its_high_byte() -> None:
    gray = WIDE[..., 0]
    assert np.array_equal(decoded(png_16(gray, 0)), np.stack([gray >> 8] * 3, -1))


def test_16_bit_gray_with_a_transparent_value_becomes_rgba() -> None:
    gray = WIDE[..., 0]
    pixels = decoded(png_16(gray, 0, struct.pack(">H", gray[2, 3])))
    assert np.array_equal(pixels[..., 3] == 0, gray == gray[2, 3])


def test_16_bit_colour_with_a_transparent_value_becomes_rgba() -> None:
    pixels = decoded(png_16(WIDE[..., :3], 2, struct.pack(">HHH", *WIDE[2, 3, :3])))
    assert np.argwhere(pixels[..., 3] == 0).tolist() == [[2, 3]]


def test_16_bit_tiff_keeps_its_high_byte() -> None:
    gray = WIDE[..., 0].astype(np.uint16)
    assert np.array_equal(decoded(encoded(Image.fromarray(gray), "TIFF"))[..., 0], gray >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_of_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="image: samples of 32 bits"):
        decoded(encoded(Image.new(mode, (3, 3)), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decoded(data)[3, 3].tolist() == [255, 0, 0]


def test_of_a_multi_picture_jpeg_the_first_picture_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data)[8, 8].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_orientation_is_applied_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(SMOOTH), form, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decoded(data), expected)
    assert decoded(data).shape[:2] == ((30, 40) if orientation < 5 else (40, 30))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_damaged_metadata_beside_sound_pixels_does_no_harm(exif: bytes) -> None:
    assert decoded(encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif)).shape == (30, 40, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_means_nothing_changes_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(Image.fromarray(RGB), "PNG", exif=exif)), RGB)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "image[1]", "mask"])
@pytest.mark.parametrize(
    "data", [b"", b"\0" * 16, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"]
)
def test_what_is_no_image_is_refused_by_the_name_of_its_field(name: str, data: bytes) -> None:
    with pytest.raises(ImageError, match="not a readable PNG, JPEG, WebP, GIF, BMP or TIFF image") as caught:
        decoded(data, name)
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name}: ")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_an_image_cut_short_is_refused(form: str, kept: float) -> None:
    data = encoded(Image.fromarray(RGB), form)
    with pytest.raises(ImageError):
        decoded(data[: int(len(data) * kept)])


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX"])
def test_formats_that_nobody_needs_are_refused(form: str) -> None:
    assert form not in FORMATS
    with pytest.raises(ImageError):
        decoded(encoded(Image.fromarray(RGB), form))


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    head = encoded(Image.new("RGB", (1, 1)), "PNG")
    large = head[:16] + struct.pack(">II", 1_001, 1_000) + head[24:]  # a header that promises what does not follow
    crc = struct.pack(">I", zlib.crc32(large[12:29]))
    with pytest.raises(ImageError, match="1001x1000 is too large: at most 1000000 pixels, 2000 on a side"):
        decoded(large[:29] + crc + large[33:])


def test_the_limits_themselves_are_allowed() -> None:
    data = encoded(Image.new("1", (100, 50)), "PNG")
    assert decode_image(data, "image", Limits(5_000, 100)).shape == (50, 100, 3)
    for limits in (Limits(4_999, 100), Limits(5_000, 99)):
        with pytest.raises(ImageError, match="too large"):
            decode_image(data, "image", limits)


SAMPLES = [
    encoded(Image.fromarray(RGB), "PNG"),
    encoded(Image.fromarray(SMOOTH), "JPEG"),
    encoded(Image.fromarray(RGB), "WEBP"),
    encoded(Image.fromarray(RGB), "GIF"),
    encoded(Image.fromarray(RGB), "TIFF"),
    encoded(Image.fromarray(RGB).convert("P"), "BMP"),
]


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(SAMPLES), st.integers(0), st.binary(min_size=1, max_size=8), st.booleans())
def test_damaged_bytes_give_an_image_or_an_image_error(sample: bytes, place: int, damage: bytes, cut: bool) -> None:
    place %= len(sample)
    data = sample[:place] + damage + (b"" if cut else sample[place + len(damage) :])
    try:
        pixels = decoded(data)
    except ImageError as error:
        assert error.param == "image"
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] in (3, 4)


# --- what goes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize("pixels", [RGB, RGBA], ids=["rgb", "rgba"])
def test_lossless_output_is_lossless(form: str, pixels: Pixels) -> None:
    assert np.array_equal(decoded(encode_image(pixels, form, 100, "x")), pixels)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_less_quality_makes_fewer_bytes(form: str) -> None:
    sizes = [len(encode_image(RGB, form, quality)) for quality in (0, 30, 60, 99)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_jpeg_shows_transparent_pixels_on_white() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    assert decoded(encode_image(pixels, "jpeg", 100)).min() >= 254


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_format_is_what_was_asked_for(form: str) -> None:
    with Image.open(io.BytesIO(encode_image(RGB, form))) as image:
        assert image.format == form.upper()


TEXT = "a cat, ÄÖ 猫 😀\nNegative prompt: dog\nSteps: 3, Seed: 1"


def test_png_carries_its_parameters_as_text() -> None:
    with Image.open(io.BytesIO(encode_image(RGB, "png", parameters=TEXT))) as image:
        assert image.info == {"parameters": TEXT}


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_jpeg_and_webp_carry_their_parameters_as_a_user_comment(form: str) -> None:
    with Image.open(io.BytesIO(encode_image(RGB, form, 90, TEXT))) as image:
        exif = image.getexif()
        comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == TEXT
    assert dict(exif).keys() == {0x8769}


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_without_parameters_there_is_no_metadata_at_all(form: str) -> None:
    with Image.open(io.BytesIO(encode_image(RGB, form, 90))) as image:
        assert not {"parameters", "exif", "xmp", "comment", "icc_profile"} & set(image.info)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("text", ["x" * 40_000, "猫" * 40_000, "a\0b", "\ud83d"])
def test_no_text_is_too_long_or_too_strange_to_write(form: str, text: str) -> None:
    assert decoded(encode_image(SMOOTH, form, 90, text)).shape == SMOOTH.shape


@pytest.mark.parametrize(("depth", "clear", "row"), [(1, 1, 0b01010101), (2, 1, 0b00011011), (4, 7, 0x3_7), (8, 9, 9)])
def test_the_transparent_level_of_a_gray_png_goes_with_its_samples(depth: int, clear: int, row: int) -> None:
    data = png_of(8 // depth, 1, depth, 0, [bytes([row])], struct.pack(">H", clear))
    samples = [row >> (8 - depth * (k + 1)) & (1 << depth) - 1 for k in range(8 // depth)]
    expected = [0 if sample == clear else 255 for sample in samples]
    assert decoded(data)[0, :, 3].tolist() == expected
    assert 0 in expected


def test_a_dark_transparent_colour_of_16_bits_goes_with_its_samples() -> None:
    samples = np.array([[[0, 0, 200], [0, 0, 60_000]]])
    assert decoded(png_16(samples, 2, struct.pack(">HHH", 0, 0, 200)))[0, :, 3].tolist() == [0, 255]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_of_rgb_samples_is_found_and_others_are_not(form: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray = profile[:16] + b"GRAY" + profile[20:]
    assert colour_profile(encoded(Image.fromarray(RGB), form, icc_profile=profile)) == profile
    assert colour_profile(encoded(Image.fromarray(RGB), form)) == b""
    assert colour_profile(encoded(Image.fromarray(RGB), form, icc_profile=gray)) == b""


def test_a_profile_of_more_than_a_mebibyte_is_left_out() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colour_profile(encoded(Image.fromarray(RGB), "TIFF", icc_profile=profile + bytes(1 << 20))) == b""


# --- alpha ------------------------------------------------------------------------------------------------------------


def test_flatten_leaves_opaque_pixels_alone_and_shows_clear_ones_white() -> None:
    pixels = RGBA.copy()
    pixels[0, :, 3], pixels[1, :, 3] = 255, 0
    flat = flatten(pixels)
    assert np.array_equal(flat[0], pixels[0, :, :3])
    assert (flat[1] == 255).all()
    assert flatten(RGB) is RGB
    assert not has_alpha(flat)


def test_flatten_mixes_by_alpha() -> None:
    pixels = np.array([[[0, 100, 255, 128]]], np.uint8)
    assert flatten(pixels)[0, 0].tolist() == [127, 177, 255]


def test_a_png_whose_pixels_were_overwritten_is_refused(data: Path) -> None:
    whole = (data / "red_circle.png").read_bytes()
    with pytest.raises(ImageError, match="image"):
        decode_image(whole[:200] + bytes(400), "image", Limits(10**6, 10**4))
    damaged = bytearray(whole)
    damaged[600] ^= 1
    with pytest.raises(ImageError, match="image"):
        decode_image(bytes(damaged), "image", Limits(10**6, 10**4))
