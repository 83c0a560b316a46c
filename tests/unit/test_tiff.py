"""TIFF samples of every kind that Pillow opens: decoded right or refused, never silently wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.TiffImagePlugin import OPEN_INFO

from ovserve.errors import ImageError
from ovserve.pixels.images import Limits, Pixels, decode_image

CASES = Path(__file__).parent.parent / "data" / "cases"
HEIGHT, WIDTH = 6, 8
NOISE = np.random.default_rng(2)
GRAY, RGB, PALETTE, CMYK, YCBCR, LAB = 1, 2, 3, 5, 6, 8


def decoded(data: bytes) -> Pixels:
    return decode_image(data, "image", Limits(10**6, 10**4))


def tiff(
    samples: np.ndarray[Any, Any],
    bits: tuple[int, ...],
    photometric: int,
    order: str = "<",
    fill_order: int = 1,
    tags: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """Return an uncompressed TIFF of unsigned samples (H, W, planes)."""
    height, width, planes = samples.shape
    rows = []
    for row in samples.reshape(height, width * planes):
        if bits[0] >= 8 and bits[0] % 8 == 0:
            rows.append(row.astype(f"{order}u{bits[0] // 8}").tobytes())
        else:
            spread = (row[:, None] >> np.arange(bits[0] - 1, -1, -1)) & 1
            rows.append(np.packbits(spread.ravel().astype(np.uint8)).tobytes())
    data = b"".join(rows)
    if fill_order == 2:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little").tobytes()
    entries: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("H", (width,)),
        257: ("H", (height,)),
        258: ("H", bits),
        259: ("H", (1,)),
        262: ("H", (photometric,)),
        266: ("H", (fill_order,)),
        273: ("I", (8,)),
        277: ("H", (planes,)),
        278: ("H", (height,)),
        279: ("I", (len(data),)),
    }
    entries |= {tag: ("H", values) for tag, values in (tags or {}).items()}
    data += bytes(len(data) % 2)
    directory_at = 8 + len(data)
    more_at = directory_at + 2 + 12 * len(entries) + 4
    directory, more = struct.pack(order + "H", len(entries)), b""
    for tag, (form, values) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(values)}{form}", *values)
        kind = 3 if form == "H" else 4
        directory += struct.pack(order + "HHI", tag, kind, len(values))
        if len(content) <= 4:
            directory += content.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "I", more_at + len(more))
            more += content + bytes(len(content) % 2)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", directory_at) + data + directory + bytes(4) + more


def to_8_bits(samples: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    return samples * 255 / ((1 << bits) - 1)


def meaning(
    samples: np.ndarray[Any, Any], bits: tuple[int, ...], photometric: int, extra: tuple[int, ...], colours: np.ndarray
) -> np.ndarray[Any, Any] | None:
    """Return the picture, float (H, W, 3 or 4), by the specification; None for a meaning that is not computed here."""
    levels = to_8_bits(samples.astype(np.float64), bits[0])
    own = levels.shape[2] - len(extra)
    if photometric in (0, GRAY):
        colour = np.repeat(levels[..., :1], 3, 2)
        colour = 255 - colour if photometric == 0 else colour
    elif photometric == RGB:
        colour = levels[..., :3]
        if own == 4:  # without the tag that names the fourth sample
            extra = (2,)
    elif photometric == PALETTE:
        colour = colours[samples[..., 0]]
    elif photometric == CMYK:
        colour = (255 - levels[..., :3]) * (255 - levels[..., 3:4]) / 255
    else:
        return None
    if not extra or extra[0] == 0:
        return colour
    alpha = levels[..., 4 if photometric == CMYK else 1 if photometric in (0, GRAY, PALETTE) else 3][..., None]
    if extra[0] == 1:  # premultiplied
        colour = np.where(alpha > 0, colour * 255 / np.maximum(alpha, 1), 0)
    return np.concatenate([colour, alpha], 2)


@pytest.mark.parametrize("key", OPEN_INFO, ids=str)
def test_samples_are_right_or_refused(key: tuple[Any, ...]) -> None:
    mark, photometric, formats, fill_order, bits, extra = key
    planes = len(bits)
    samples = NOISE.integers(0, 1 << min(bits[0], 16), (HEIGHT, WIDTH, planes)).astype(np.int64)
    if 1 in extra:  # a premultiplied colour is not above its alpha; at low alpha the quotient is coarse
        at = planes - len(extra)
        top = (1 << bits[0]) - 1
        samples[..., at] = np.maximum(samples[..., at], top // 2)
        samples[..., :at] = samples[..., :at] * samples[..., at : at + 1] // top
    colours = NOISE.integers(0, 256, (1 << min(bits[0], 8), 3))
    tags: dict[int, tuple[int, ...]] = {339: formats * planes}
    if extra:
        tags[338] = extra
    if photometric == PALETTE:
        tags[320] = tuple(int(value) * 257 for value in colours.T.ravel())
    if photometric == YCBCR:
        tags[530] = (1, 1)
    data = tiff(samples, bits, photometric, "<" if mark == b"II" else ">", fill_order, tags)
    expected = meaning(samples, bits, photometric, extra, colours)
    if formats != (1,) or bits[0] == 32:
        with pytest.raises(ImageError, match=r"signed samples|32-bit samples"):
            decoded(data)
        return
    try:
        found = decoded(data)
    except ImageError:
        assert photometric in (YCBCR, LAB) or fill_order == 2, "refused, though it has a meaning"  # Pillow cannot
        return
    assert found.shape[:2] == (HEIGHT, WIDTH)
    if expected is not None:
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= (2.5 if 1 in extra else 1.5)


def test_12_bit_gray_is_scaled_to_white() -> None:
    found = decoded((CASES / "tiff12.tif").read_bytes())
    assert found.min() == 0
    assert found.max() == 255
    ramp = found[found.shape[0] // 2, :, 0].astype(int)
    assert (np.diff(ramp) >= 0).all() or (np.diff(found[:, 0, 0].astype(int)) >= 0).all()


def test_palette_with_entries_of_8_bits_is_read() -> None:
    found = decoded((CASES / "tiff_pal_8bit_entries.tif").read_bytes())
    assert (found[..., 2] == 255).all()
    assert (found[..., 0].min(), found[..., 0].max()) == (0, 255)


@pytest.mark.parametrize("entry", [255, 256, 65_535])
def test_palette_entries_of_16_bits_keep_their_high_byte(entry: int) -> None:
    tags = {320: tuple([entry] * 256 + [0] * 512)}
    found = decoded(tiff(np.zeros((2, 2, 1), np.int64), (8,), PALETTE, tags=tags))
    assert found[0, 0].tolist() == [entry if entry == 255 else entry // 256, 0, 0]


@pytest.mark.parametrize(
    ("photometric", "planes", "tags", "reason"),
    [
        (GRAY, 1, {339: (2,)}, "signed samples"),
        (CMYK, 4, {332: (2,)}, "inks"),
        (YCBCR, 3, {530: (2, 2)}, "subsampled"),
        (YCBCR, 3, {}, "subsampled"),
        (RGB, 3, {254: (1,)}, "preview"),
        (RGB, 3, {50706: (1, 4, 0, 0)}, "preview"),
    ],
)
def test_samples_without_a_known_meaning_are_refused_with_the_reason(
    photometric: int, planes: int, tags: dict[int, tuple[int, ...]], reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        decoded(tiff(np.zeros((4, 4, planes), np.int64), (8,) * planes, photometric, tags=tags))
