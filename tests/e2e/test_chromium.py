"""Image files of every format and mode, decoded by us and by Chromium: equal within 2 levels, or listed with a reason.

Skipped where Chromium is not installed (Debian: `apt install chromium`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from ovserve.errors import ImageError
from ovserve.pixels.images import Limits, Pixels, decode_image, extract_colour_profile
from tests.chromium import EXECUTABLE, decode_in_chromium
from tests.pngs import chunk, png_file
from tests.unit.test_colour import BT2020_CHRM, SRGB_CHRM, SRGB_PROFILE, chrm, gama, gray_profile, iccp

pytestmark = pytest.mark.skipif(not EXECUTABLE, reason="Chromium is not installed")

CASES = Path(__file__).parent.parent / "data" / "cases"
WIDTH, HEIGHT = 24, 18
NOISE = np.random.default_rng(18)
SMOOTH: Pixels = np.asarray(
    Image.fromarray(NOISE.integers(0, 256, (3, 4, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
)
RGB: Pixels = NOISE.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
RGBA: Pixels = np.dstack([RGB, NOISE.choice([0, 1, 100, 128, 254, 255], (HEIGHT, WIDTH)).astype(np.uint8)])
MAX_LEVELS = 2

# Files of which we make something else, by their names.
REASONS = {
    r"png cICP \d+ \d+ 0": "Chromium ignores the flag for narrow range; PNG, section 11.3.2.6, defines it",
    r"png cICP \d+ (16|18) 1": "brightness above white (PQ, HLG) is clipped here; Chromium compresses it to a range",
    r"png gAMA cHRM sRGB's": "these values stand for sRGB (PNG, section 11.3.2.5), whose samples come back unchanged",
    r"png without IEND": "a file without its end is refused as truncated",
    r"webp EXIF [2-8]": "Chromium ignores EXIF in WebP; here it counts in every format",
}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pngs() -> Iterator[tuple[str, bytes]]:
    for depth in (1, 2, 4, 8, 16):
        gray = NOISE.integers(0, 1 << depth, (HEIGHT, WIDTH))
        clear = chunk(b"tRNS", int(gray[3, 4]).to_bytes(2, "big"))
        yield f"png gray {depth}", png_file(gray, depth, 0)
        yield f"png gray {depth} tRNS", png_file(gray, depth, 0, clear)
        yield f"png gray {depth} gAMA 1", png_file(gray, depth, 0, gama(1.0))
        if depth <= 8:
            palette = NOISE.integers(0, 256, (1 << depth, 3)).astype(np.uint8)
            alphas = NOISE.integers(0, 256, 1 << depth).astype(np.uint8).tobytes()
            plte = chunk(b"PLTE", palette.tobytes())
            yield f"png palette {depth}", png_file(gray, depth, 3, plte)
            yield f"png palette {depth} tRNS", png_file(gray, depth, 3, plte, chunk(b"tRNS", alphas))
            yield f"png palette {depth} short tRNS", png_file(gray, depth, 3, plte, chunk(b"tRNS", alphas[:1]))
            yield f"png palette {depth} gAMA 1", png_file(gray, depth, 3, gama(1.0), plte)
        else:
            low = np.array(gray)
            low[3, 5] = low[3, 4] ^ 1
            yield "png gray 16 tRNS low byte", png_file(low, 16, 0, clear)
        if depth < 8:
            continue
        for planes, colour_type in ((3, 2), (2, 4), (4, 6)):
            samples = NOISE.integers(0, 1 << depth, (HEIGHT, WIDTH, planes))
            yield f"png type {colour_type} {depth}", png_file(samples, depth, colour_type)
            for gamma in (1.0, 0.55, 1 / 2.2, 0.45, 1 / 1.8):
                yield (
                    f"png type {colour_type} {depth} gAMA {gamma:.2f}",
                    png_file(samples, depth, colour_type, gama(gamma)),
                )
            if colour_type == 2:
                clear = chunk(b"tRNS", b"".join(int(value).to_bytes(2, "big") for value in samples[3, 4]))
                yield f"png type 2 {depth} tRNS", png_file(samples, depth, 2, clear)
    yield from png_colours()
    for orientation in range(1, 9):
        yield f"png eXIf {orientation}", encoded(Image.fromarray(RGB), "PNG", exif=exif_of(orientation))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="6"/>')
    yield "png XMP 6", encoded(Image.fromarray(RGB), "PNG", pnginfo=text)
    for kind in (b"tRNS", b"gAMA", b"pHYs", b"iCCP", b"sRGB", b"cHRM", b"tEXt", b"zTXt"):
        yield f"png damaged {kind.decode()}", png_file(RGB, 8, 2, chunk(kind, bytes(6), damaged=True))
        yield f"png wrong {kind.decode()}", png_file(RGB, 8, 2, chunk(kind, bytes(3)))
    yield "png without IEND", png_file(RGB, 8, 2)[:-12]


def png_colours() -> Iterator[tuple[str, bytes]]:
    spaces = {
        "cHRM": (chrm(BT2020_CHRM),),
        "gAMA cHRM": (gama(1 / 2.2), chrm(BT2020_CHRM)),
        "gAMA cHRM sRGB's": (gama(1 / 2.2), chrm(SRGB_CHRM)),
        "gAMA 1 cHRM": (gama(1.0), chrm(BT2020_CHRM)),
        "sRGB": (gama(1.0), chunk(b"sRGB", b"\0")),
        "iCCP": (gama(1.0), iccp(SRGB_PROFILE)),
        "iCCP damaged": (iccp(b"no profile"),),
        "iCCP damaged gAMA 1": (gama(1.0), iccp(b"no profile")),
        "iCCP large": (iccp(SRGB_PROFILE + bytes(2 << 20)),),
        **{
            f"cICP {primaries} {transfer} {full}": (chunk(b"cICP", bytes((primaries, transfer, 0, full))),)
            for primaries in (1, 5, 6, 9, 11, 12)
            for transfer in (1, 4, 5, 6, 8, 13, 14, 15, 16, 18)
            for full in (0, 1)
            if full or primaries == 1
        },
    }
    for name, chunks in spaces.items():
        yield f"png {name}", png_file(SMOOTH, 8, 2, *chunks)
    gray = NOISE.integers(0, 256, (HEIGHT, WIDTH))
    for gamma in (1.0, 2.2):
        yield f"png gray iCCP {gamma}", png_file(gray, 8, 0, iccp(gray_profile(gamma)))


def others() -> Iterator[tuple[str, bytes]]:
    smooth, noise = Image.fromarray(SMOOTH), Image.fromarray(RGB)
    for quality in (50, 95):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            yield f"jpeg {quality} {subsampling}", encoded(smooth, "JPEG", quality=quality, subsampling=subsampling)
    yield "jpeg progressive", encoded(smooth, "JPEG", progressive=True)
    yield "jpeg gray", encoded(smooth.convert("L"), "JPEG")
    yield "jpeg RGB", encoded(smooth, "JPEG", keep_rgb=True, quality=95)
    yield "jpeg CMYK", encoded(smooth.convert("CMYK"), "JPEG", quality=95)
    yield "jpeg profile", encoded(smooth, "JPEG", icc_profile=SRGB_PROFILE)
    yield "jpeg gray profile", encoded(smooth.convert("L"), "JPEG", quality=95, icc_profile=gray_profile())
    for orientation in range(1, 9):
        for form, options in (("JPEG", {}), ("WEBP", {"lossless": True}), ("AVIF", {"quality": 100})):
            name = f"{form.lower()} EXIF {orientation}"
            yield name, encoded(smooth, form, exif=exif_of(orientation), **options)
    yield "jpeg XMP", (CASES / "xmp6.jpg").read_bytes()
    for mode in ("RGB", "RGBA"):
        image = noise if mode == "RGB" else Image.fromarray(RGBA)
        yield f"webp lossless {mode}", encoded(image, "WEBP", lossless=True, exact=True)
        yield f"webp lossy {mode}", encoded(smooth.convert(mode), "WEBP", quality=90)
        yield f"avif {mode}", encoded(smooth.convert(mode), "AVIF", quality=90)
        yield f"bmp {mode}", encoded(image, "BMP")
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    yield "webp animation", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield "gif animation", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "png animation", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield "webp profile", encoded(smooth, "WEBP", lossless=True, icc_profile=SRGB_PROFILE)
    yield "avif profile", encoded(smooth, "AVIF", quality=100, icc_profile=SRGB_PROFILE)
    for mode in ("1", "L", "P"):
        yield f"bmp {mode}", encoded(noise.convert(mode), "BMP")
        yield f"gif {mode}", encoded(noise.convert(mode), "GIF")
    palette = noise.convert("P")
    yield "gif transparency", encoded(palette, "GIF", transparency=palette.getpixel((4, 3)))
    yield "gif interlaced", encoded(palette, "GIF", interlace=1)
    yield "gif partial frame", (CASES / "first_partial.gif").read_bytes()


def in_srgb(data: bytes) -> Pixels | str:
    """Return uint8 (H, W, 4) as we decode it, its kept profile applied; or the error."""
    try:
        pixels = decode_image(data, "image", Limits(10**6, 10**4))
    except ImageError as error:
        return error.message
    colour = Image.fromarray(pixels[..., :3])
    if profile := extract_colour_profile(data):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colour = ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or colour
    alpha = pixels[..., 3] if pixels.shape[2] == 4 else np.full(pixels.shape[:2], 255, np.uint8)
    return np.dstack([np.asarray(colour), alpha])


def difference(ours: Pixels | str, theirs: Pixels | str) -> str:
    """Describe the difference of two results; empty if there is none above MAX_LEVELS."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return "" if isinstance(ours, str) and isinstance(theirs, str) else f"{ours!s:.60} / {theirs!s:.60}"
    if ours.shape != theirs.shape:
        return f"{ours.shape} / {theirs.shape}"
    apart = np.abs(ours.astype(int) - theirs)
    apart[..., :3][theirs[..., 3] == 0] = 0  # the colour of a transparent pixel shows nowhere
    if apart.max() <= MAX_LEVELS:
        return ""
    y, x = np.unravel_index(apart.max(-1).argmax(), apart.shape[:2])
    return f"{apart.max()} levels: {ours[y, x].tolist()} / {theirs[y, x].tolist()}"


def test_files_look_as_in_chromium_or_the_reason_is_listed(tmp_path: Path) -> None:
    files = dict([*pngs(), *others()])
    shown = decode_in_chromium(files, tmp_path)
    unlisted, seen = [], set()
    for name, data in files.items():
        apart = difference(in_srgb(data), shown[name])
        reason = next((pattern for pattern in REASONS if re.fullmatch(pattern, name)), None)
        if reason is not None:
            seen |= {reason} if apart else set()
        elif apart:
            unlisted.append(f"{name}: {apart}")
    assert not unlisted, "\n".join([f"of {len(files)} files:", *unlisted])
    assert seen == set(REASONS), f"listed, but alike: {set(REASONS) - seen}"
