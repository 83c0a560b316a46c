"""Decoding image files to arrays and encoding arrays to image files."""

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
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from ovserve.errors import ImageError
from ovserve.pixels.images import (
    FORMATS,
    Limits,
    Pixels,
    decode_image,
    encode_image,
    extract_colour_profile,
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
    """Return a PNG of 16-bit samples, which Pillow does not write."""
    height, width = samples.shape[:2]
    rows = [row.astype(">u2").tobytes() for row in samples]
    return png_of(width, height, 16, colour_type, rows, clear)


def png_of(width: int, height: int, depth: int, colour_type: int, lines: list[bytes], clear: bytes = b"") -> bytes:
    """Return a PNG (specification: 5.3, 11.2) of the stored rows `lines`, with a tRNS chunk if `clear` is not empty."""

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


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_decode_bit_for_bit(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(decoded(encoded(Image.fromarray(RGB), form, **options)), RGB)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_alpha_and_colour_of_transparent_pixels_decode_bit_for_bit(form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert np.array_equal(decoded(encoded(Image.fromarray(RGBA), form, **options)), RGBA)


@pytest.mark.parametrize("form", ["JPEG", "GIF", "AVIF"])
def test_lossy_formats_decode_approximately(form: str) -> None:
    pixels = decoded(encoded(Image.fromarray(SMOOTH), form))
    assert pixels.shape == SMOOTH.shape
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_gray_and_palette_decode_to_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_gray_with_alpha_decodes_to_rgba() -> None:
    image = Image.fromarray(RGBA).convert("LA")
    assert np.array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGBA")))


def test_palette_with_a_transparent_entry_decodes_to_rgba() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 2), 1)
    pixels = decoded(encoded(image, "PNG", transparency=1))
    assert pixels[2, 1].tolist() == [40, 50, 60, 0]
    assert pixels[0, 0].tolist() == [10, 20, 30, 255]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_cmyk_and_ycbcr_decode_to_rgb(mode: str) -> None:
    pixels = decoded(encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 6


@pytest.mark.parametrize(("planes", "colour_type"), [(3, 2), (4, 6)])
def test_16_bit_colour_keeps_its_high_byte(planes: int, colour_type: int) -> None:
    assert np.array_equal(decoded(png_16(WIDE[..., :planes], colour_type)), WIDE[..., :planes] >> 8)


def test_16_bit_gray_keeps_its_high_byte() -> None:
    gray = WIDE[..., 0]
    assert np.array_equal(decoded(png_16(gray, 0)), np.stack([gray >> 8] * 3, -1))


def test_16_bit_gray_with_a_transparent_value_decodes_to_rgba() -> None:
    gray = WIDE[..., 0]
    pixels = decoded(png_16(gray, 0, struct.pack(">H", gray[2, 3])))
    assert np.array_equal(pixels[..., 3] == 0, gray == gray[2, 3])


def test_16_bit_colour_with_a_transparent_value_decodes_to_rgba() -> None:
    pixels = decoded(png_16(WIDE[..., :3], 2, struct.pack(">HHH", *WIDE[2, 3, :3])))
    assert np.argwhere(pixels[..., 3] == 0).tolist() == [[2, 3]]


def test_16_bit_tiff_keeps_its_high_byte() -> None:
    gray = WIDE[..., 0].astype(np.uint16)
    assert np.array_equal(decoded(encoded(Image.fromarray(gray), "TIFF"))[..., 0], gray >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_samples_are_rejected(mode: str) -> None:
    with pytest.raises(ImageError, match="image: 32-bit samples"):
        decoded(encoded(Image.new(mode, (3, 3)), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_decodes_to_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decoded(data)[3, 3].tolist() == [255, 0, 0]


def test_multi_picture_jpeg_decodes_to_its_first_picture() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data)[8, 8].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(form: str, orientation: int) -> None:
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
def test_damaged_exif_does_not_reject_intact_pixels(exif: bytes) -> None:
    assert decoded(encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif)).shape == (30, 40, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_undefined_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(Image.fromarray(RGB), "PNG", exif=exif)), RGB)


# --- rejected files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "image[1]", "mask"])
@pytest.mark.parametrize(
    "data", [b"", b"\0" * 16, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"]
)
def test_unreadable_bytes_are_rejected_naming_the_field(name: str, data: bytes) -> None:
    with pytest.raises(ImageError, match="not a readable PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF image") as caught:
        decoded(data, name)
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name}: ")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_image_is_rejected(form: str, kept: float) -> None:
    data = encoded(Image.fromarray(RGB), form)
    with pytest.raises(ImageError):
        decoded(data[: int(len(data) * kept)])


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX"])
def test_formats_outside_the_list_are_rejected(form: str) -> None:
    assert form not in FORMATS
    with pytest.raises(ImageError):
        decoded(encoded(Image.fromarray(RGB), form))


def test_size_limit_is_checked_before_decoding() -> None:
    head = encoded(Image.new("RGB", (1, 1)), "PNG")
    large = head[:16] + struct.pack(">II", 1_001, 1_000) + head[24:]  # only the header has this size
    crc = struct.pack(">I", zlib.crc32(large[12:29]))
    with pytest.raises(ImageError, match="1001x1000 is too large; at most 1000000 pixels and 2000 px on a side"):
        decoded(large[:29] + crc + large[33:])


def test_size_at_the_limit_is_accepted_and_one_more_is_rejected() -> None:
    data = encoded(Image.new("1", (100, 50)), "PNG")
    assert decode_image(data, "image", Limits(5_000, 100)).shape == (50, 100, 3)
    for limits in (Limits(4_999, 100), Limits(5_000, 99)):
        with pytest.raises(ImageError, match="too large"):
            decode_image(data, "image", limits)


AVIF = encoded(Image.fromarray(SMOOTH), "AVIF")
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
def test_damaged_bytes_give_pixels_or_an_image_error(sample: bytes, offset: int, damage: bytes, cut: bool) -> None:
    offset %= len(sample)
    data = sample[:offset] + damage + (b"" if cut else sample[offset + len(damage) :])
    try:
        pixels = decoded(data)
    except ImageError as error:
        assert error.param == "image"
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] in (3, 4)


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize("pixels", [RGB, RGBA], ids=["rgb", "rgba"])
def test_png_and_webp_at_100_encode_losslessly(form: str, pixels: Pixels) -> None:
    assert np.array_equal(decoded(encode_image(pixels, form, 100, "x")), pixels)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_lower_quality_gives_smaller_files(form: str) -> None:
    sizes = [len(encode_image(RGB, form, quality)) for quality in (0, 30, 60, 99)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_jpeg_composites_transparent_pixels_over_white() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    assert decoded(encode_image(pixels, "jpeg", 100)).min() >= 254


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_output_has_the_requested_format(form: str) -> None:
    with Image.open(io.BytesIO(encode_image(RGB, form))) as image:
        assert image.format == form.upper()


TEXT = "a cat, ÄÖ 猫 😀\nNegative prompt: dog\nSteps: 3, Seed: 1"


def test_png_stores_parameters_as_a_text_chunk() -> None:
    with Image.open(io.BytesIO(encode_image(RGB, "png", parameters=TEXT))) as image:
        assert image.info == {"parameters": TEXT}


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_jpeg_and_webp_store_parameters_as_an_exif_user_comment(form: str) -> None:
    with Image.open(io.BytesIO(encode_image(RGB, form, 90, TEXT))) as image:
        exif = image.getexif()
        comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == TEXT
    assert dict(exif).keys() == {0x8769}


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_no_parameters_means_no_metadata(form: str) -> None:
    with Image.open(io.BytesIO(encode_image(RGB, form, 90))) as image:
        assert not {"parameters", "exif", "xmp", "comment", "icc_profile"} & set(image.info)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("text", ["x" * 40_000, "猫" * 40_000, "a\0b", "\ud83d"])
def test_long_and_unencodable_parameters_still_encode(form: str, text: str) -> None:
    assert decoded(encode_image(SMOOTH, form, 90, text)).shape == SMOOTH.shape


@pytest.mark.parametrize(("depth", "clear", "row"), [(1, 1, 0b01010101), (2, 1, 0b00011011), (4, 7, 0x3_7), (8, 9, 9)])
def test_trns_value_of_a_gray_png_is_scaled_like_its_samples(depth: int, clear: int, row: int) -> None:
    data = png_of(8 // depth, 1, depth, 0, [bytes([row])], struct.pack(">H", clear))
    samples = [row >> (8 - depth * (k + 1)) & (1 << depth) - 1 for k in range(8 // depth)]
    expected = [0 if sample == clear else 255 for sample in samples]
    assert decoded(data)[0, :, 3].tolist() == expected
    assert 0 in expected


def test_trns_colour_of_a_16_bit_png_is_compared_in_16_bits() -> None:
    samples = np.array([[[0, 0, 200], [0, 0, 60_000]]])
    assert decoded(png_16(samples, 2, struct.pack(">HHH", 0, 0, 200)))[0, :, 3].tolist() == [0, 255]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_only_rgb_profiles_are_extracted(form: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray = profile[:16] + b"GRAY" + profile[20:]
    assert extract_colour_profile(encoded(Image.fromarray(RGB), form, icc_profile=profile)) == profile
    assert extract_colour_profile(encoded(Image.fromarray(RGB), form)) == b""
    assert extract_colour_profile(encoded(Image.fromarray(RGB), form, icc_profile=gray)) == b""


def test_profile_over_one_mebibyte_is_not_repeated_in_results() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert extract_colour_profile(encoded(Image.fromarray(RGB), "TIFF", icc_profile=profile + bytes(1 << 20))) == b""


# --- alpha ------------------------------------------------------------------------------------------------------------


def test_flatten_keeps_opaque_pixels_and_makes_transparent_ones_white() -> None:
    pixels = RGBA.copy()
    pixels[0, :, 3], pixels[1, :, 3] = 255, 0
    flat = flatten(pixels)
    assert np.array_equal(flat[0], pixels[0, :, :3])
    assert (flat[1] == 255).all()
    assert flatten(RGB) is RGB
    assert not has_alpha(flat)


def test_flatten_blends_by_alpha() -> None:
    pixels = np.array([[[0, 100, 255, 128]]], np.uint8)
    assert flatten(pixels)[0, 0].tolist() == [127, 177, 255]


def test_png_with_overwritten_pixel_data_is_rejected(data: Path) -> None:
    whole = (data / "red_circle.png").read_bytes()
    with pytest.raises(ImageError, match="image"):
        decode_image(whole[:200] + bytes(400), "image", Limits(10**6, 10**4))
    damaged = bytearray(whole)
    damaged[600] ^= 1
    with pytest.raises(ImageError, match="image"):
        decode_image(bytes(damaged), "image", Limits(10**6, 10**4))


# --- orientation ------------------------------------------------------------------------------------------------------


def test_orientation_of_xmp_is_ignored_as_in_browsers(data: Path) -> None:
    turned, plain = ((data / "cases" / name).read_bytes() for name in ("xmp6_256.jpg", "plain_256.jpg"))
    assert np.array_equal(decoded(turned), decoded(plain))
    small = decoded((data / "cases" / "xmp6.jpg").read_bytes())
    with Image.open(data / "cases" / "xmp6.jpg") as image:
        assert small.shape[1::-1] == image.size


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("exif_too", [False, True])
def test_orientation_comes_from_exif_alone(form: str, exif_too: bool) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    options: dict[str, object] = {"lossless": True} if form == "WEBP" else {}
    exif = Image.Exif()
    if exif_too:
        exif[0x0112] = 3
    if form == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        raw = Image.Exif()
        raw[0x0112] = 8
        chunks.add_text("Raw profile type exif", f"\nexif\n8\n{raw.tobytes().hex()}\n")
        options["pnginfo"] = chunks
    elif form == "TIFF":
        exif[700] = xmp
    else:
        options["xmp"] = xmp
    found = decoded(encoded(Image.fromarray(SMOOTH), form, exif=exif, **options))
    plain = decoded(encoded(Image.fromarray(SMOOTH), form, **({"lossless": True} if form == "WEBP" else {})))
    assert np.array_equal(found, plain[::-1, ::-1] if exif_too else plain)


# --- first frames -----------------------------------------------------------------------------------------------------


def test_gif_frame_smaller_than_the_screen_leaves_transparency(data: Path) -> None:
    found = decoded((data / "cases" / "first_partial.gif").read_bytes())
    with Image.open(data / "cases" / "first_partial.gif") as image:
        left, top, right, bottom = image.tile[0].extents
    inside = np.zeros(found.shape[:2], bool)
    inside[top:bottom, left:right] = True
    assert not inside.all()
    assert (found[inside][:, 3] == 255).all()
    assert not found[~inside].any()


def test_gif_frame_larger_than_the_screen_is_whole_and_opaque() -> None:
    gif = bytearray(encoded(Image.new("P", (10, 9), 0), "GIF"))
    gif[6:10] = struct.pack("<HH", 4, 4)
    assert decoded(bytes(gif)).shape == (9, 10, 3)


def test_gif_frame_keeps_its_own_transparency() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 2), 1)
    gif = bytearray(encoded(image, "GIF", transparency=1))
    gif[6:10] = struct.pack("<HH", 6, 5)
    found = decoded(bytes(gif))
    assert found.shape == (5, 6, 4)
    assert found[2, 1, 3] == 0
    assert found[0, 0].tolist() == [10, 20, 30, 255]
    assert not found[4:].any()
    assert not found[:, 4:].any()


@pytest.mark.parametrize("flags", [0x02, 0x12], ids=["without alpha", "with alpha"])
def test_webp_frame_smaller_than_the_canvas_leaves_transparency(flags: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def number(value: int) -> bytes:
        return value.to_bytes(3, "little")

    still = encoded(Image.new("RGB", (8, 6), (200, 10, 10)), "WEBP", lossless=True)
    frame = chunk(b"ANMF", number(2) + number(3) + number(7) + number(5) + number(100) + b"\0" + still[12:])
    head = chunk(b"VP8X", bytes([flags, 0, 0, 0]) + number(15) + number(15)) + chunk(b"ANIM", bytes(6))
    body = b"WEBP" + head + frame + frame
    found = decoded(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert (found[6:12, 4:12] == [200, 10, 10, 255]).all()
    assert found[..., 3].sum() == 255 * 48


# --- AVIF -------------------------------------------------------------------------------------------------------------


def test_avif_with_alpha_decodes_to_rgba() -> None:
    pixels = np.dstack([SMOOTH, np.full((30, 40), 100, np.uint8)])
    found = decoded(encoded(Image.fromarray(pixels), "AVIF", quality=100))
    assert found.shape == (30, 40, 4)
    assert np.abs(found[..., 3].astype(int) - 100).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_an_avif_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decoded(encoded(Image.fromarray(SMOOTH), "AVIF", exif=exif, quality=100, subsampling="4:4:4"))
    turned = Image.fromarray(SMOOTH)
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4


def test_code_points_of_an_avif_are_converted_and_a_profile_is_kept() -> None:
    gray = Image.new("RGB", (16, 16), (64, 64, 64))
    data = encoded(gray, "AVIF", quality=100)
    at = data.index(b"nclx") + 4
    linear = data[:at] + struct.pack(">HH", 1, 8) + data[at + 4 :]
    assert np.abs(decoded(data)[8, 8].astype(int) - 64).max() <= 1
    assert np.abs(decoded(linear)[8, 8].astype(int) - 137).max() <= 2
    with pytest.raises(ImageError, match="not supported; send the image in sRGB"):
        decoded(data[:at] + struct.pack(">HH", 1, 200) + data[at + 4 :])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert extract_colour_profile(encoded(gray, "AVIF", icc_profile=profile)) == profile


@given(st.integers(0), st.binary(min_size=1, max_size=8))
def test_damaged_avif_gives_pixels_or_an_image_error(offset: int, damage: bytes) -> None:
    offset %= len(AVIF)
    data = AVIF[:offset] + damage + AVIF[offset + len(damage) :]
    try:
        assert decoded(data).ndim == 3
    except ImageError as error:
        assert error.param == "image"
