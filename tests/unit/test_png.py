"""Reading the chunks of PNG files: metadata costs nothing, and damage counts where a browser says that it counts."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from ovserve.errors import ImageError
from ovserve.pixels.images import Limits, Pixels, decode_image
from ovserve.pixels.png import MAX_CHUNKS, SIGNATURE, read_png
from tests.pngs import chunk, png_file

CASES = Path(__file__).parent.parent / "data" / "cases"
RGB: Pixels = np.random.default_rng(9).integers(0, 256, (6, 5, 3), np.uint8)
PLAIN = png_file(RGB, 8, 2)


def decoded(data: bytes) -> Pixels:
    return decode_image(data, "image", Limits(10**6, 10**4))


def test_text_above_one_mebibyte_does_not_refuse_a_sound_picture() -> None:
    assert decoded((CASES / "png_ztxt_1100k.png").read_bytes())[8, 8].tolist() == [128, 64, 32]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt"])
def test_text_is_never_inflated(kind: bytes) -> None:
    bomb = zlib.compress(bytes(100 << 20), 9)
    text = {b"zTXt": b"a\0\0" + bomb, b"iTXt": b"a\0\1\0\0\0" + bomb, b"tEXt": b"a\0" + bomb}[kind]
    started = time.monotonic()
    pixels = decoded(png_file(RGB, 8, 2, *[chunk(kind, text)] * 20, after=chunk(kind, text)))
    assert time.monotonic() - started < 2  # inflating takes ten times as long
    assert np.array_equal(pixels, RGB)


def test_unknown_chunks_and_animations_do_not_change_the_picture() -> None:
    control = chunk(b"acTL", bytes(8)) + chunk(b"fcTL", bytes(26))
    extra = chunk(b"prVt", bytes(5_000)) + control + chunk(b"sBIT", b"\0") + chunk(b"PLTE", bytes(3))
    assert np.array_equal(decoded(png_file(RGB, 8, 2, extra, after=chunk(b"fdAT", bytes(9)))), RGB)


def test_wrong_checksum_of_an_ancillary_chunk_is_ignored() -> None:
    assert decoded((CASES / "badcrc_phys.png").read_bytes())[..., :3].any()
    for kind in (b"pHYs", b"tEXt", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"tRNS", b"eXIf"):
        assert np.array_equal(decoded(png_file(RGB, 8, 2, chunk(kind, bytes(6), damaged=True))), RGB)


def test_chunk_with_a_wrong_checksum_has_no_effect() -> None:
    gray = np.array([[64, 9]])
    for kind, content in ((b"gAMA", (100_000).to_bytes(4, "big")), (b"tRNS", b"\0\x40")):
        assert not np.array_equal(decoded(png_file(gray, 8, 0, chunk(kind, content))), decoded(png_file(gray, 8, 0)))
        damaged = decoded(png_file(gray, 8, 0, chunk(kind, content, damaged=True)))
        assert np.array_equal(damaged, decoded(png_file(gray, 8, 0)))


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
def test_wrong_checksum_of_a_critical_chunk_is_refused_with_the_reason(kind: bytes) -> None:
    palette = png_file(np.array([[0, 1]]), 8, 3, chunk(b"PLTE", bytes(6)))
    at = palette.index(kind)
    length = int.from_bytes(palette[at - 4 : at], "big")
    damaged = bytearray(palette)
    damaged[at + 4 + length] ^= 1
    with pytest.raises(ImageError, match=f"the checksum of a chunk {kind.decode()} is wrong"):
        decoded(bytes(damaged))


def test_tail_after_the_end_is_ignored_and_a_cut_file_is_refused() -> None:
    assert np.array_equal(decoded(PLAIN + b"tail"), RGB)
    for size in range(len(SIGNATURE), len(PLAIN)):
        with pytest.raises(ImageError, match="image: "):
            decoded(PLAIN[:size])


def test_number_of_chunks_is_limited() -> None:
    started = time.monotonic()
    with pytest.raises(ImageError, match=f"more than {MAX_CHUNKS} chunks"):
        decoded(png_file(RGB, 8, 2, chunk(b"tEXt", b"") * (2 * MAX_CHUNKS)))
    assert time.monotonic() - started < 2


def test_decoder_gets_only_what_the_pixels_need() -> None:
    found = read_png(png_file(RGB, 8, 2, chunk(b"gAMA", bytes(4)), chunk(b"tEXt", b"x"), chunk(b"tRNS", bytes(6))))
    assert found.stream == png_file(RGB, 8, 2, chunk(b"tRNS", bytes(6)))
    assert found.ancillary == {b"gAMA": bytes(4), b"tRNS": bytes(6)}
    assert (found.depth, found.colour_type) == (8, 2)


@pytest.mark.parametrize(("colour_type", "planes", "size"), [(0, 1, 1), (2, 3, 2), (4, 2, 2), (6, 4, 6), (3, 1, 300)])
def test_transparency_of_a_wrong_size_is_ignored(colour_type: int, planes: int, size: int) -> None:
    palette = (chunk(b"PLTE", bytes(range(30))),) if colour_type == 3 else ()
    samples = np.full((2, 2, planes), 7)
    plain = decoded(png_file(samples, 8, colour_type, *palette))
    assert np.array_equal(decoded(png_file(samples, 8, colour_type, *palette, chunk(b"tRNS", bytes(size)))), plain)


def test_transparent_colour_of_16_bit_samples_is_compared_at_16_bits() -> None:
    pixels = decoded((CASES / "rgb16_trns_low.png").read_bytes())
    half = pixels.shape[1] // 2
    assert (pixels[:, :half, 3] == 0).all()
    assert (pixels[:, half:, 3] == 255).all()


def test_transparent_colour_of_16_bits_needs_every_plane_to_match() -> None:
    clear = (0x1234, 0xABCD, 0x00FF)
    rows = [[clear, (0x1235, 0xABCD, 0x00FF), (0x1234, 0xABCC, 0x00FF), (0x1234, 0xABCD, 0x01FF), clear]]
    content = b"".join(value.to_bytes(2, "big") for value in clear)
    assert decoded(png_file(np.array(rows), 16, 2, chunk(b"tRNS", content)))[0, :, 3].tolist() == [0, 255, 255, 255, 0]
