"""HEIC files through the package of the extra `heic`: pixels, orientation, alpha, and what is counted before decoding.

The files in `data/heic` were made with pillow-heif 1.8, which also encodes: four rectangles, red and green above blue
and gray. `rotated` says that its first row is the right side; `alpha` is transparent on the right.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from ovserve.api.parameters.imagehead import read_head
from ovserve.errors import ImageError
from ovserve.pixels.counts.inspect import inspect
from ovserve.pixels.heic import MAX_ITEMS, MAX_LEVELS, is_heic, reads_heic
from ovserve.pixels.images import Limits, decode_image
from ovserve.settings.options import Settings

pytestmark = pytest.mark.skipif(not reads_heic(), reason="the extra heic is not installed")

DATA = Path(__file__).parents[1] / "data" / "heic"
LIMITS = Limits(1_000_000, 4096)
RED, GREEN, BLUE, GRAY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 220)


def read(name: str) -> bytes:
    return (DATA / f"{name}.heic").read_bytes()


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """Return the colours of the corners: upper left, upper right, lower left, lower right."""
    return [tuple(int(value) for value in pixels[y, x, :3]) for y in (3, -4) for x in (3, -4)]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("plain", (48, 64, 3), [RED, GREEN, BLUE, GRAY]),
        ("rotated", (64, 48, 3), [BLUE, RED, GRAY, GREEN]),
        ("alpha", (48, 64, 4), [RED, GREEN, BLUE, GRAY]),
    ],
)
def test_picture_is_decoded_upright(name: str, shape: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    pixels = decode_image(read(name), "image", LIMITS)
    assert pixels.shape == shape
    assert np.abs(np.array(corners(pixels)) - expected).max() <= 3
    if name == "alpha":
        assert (pixels[:, :30, 3] == 255).all()
        assert (pixels[:, 34:, 3] == 0).all()


@pytest.mark.parametrize("name", ["plain", "rotated", "alpha"])
def test_header_and_counts_are_read_without_decoding(name: str) -> None:
    head = read_head(memoryview(read(name)), "image", Settings())
    assert (head.format, head.width, head.height) == ("HEIC", 64, 48)
    assert head.may_be_transparent is (name == "alpha")
    facts = inspect(memoryview(read(name)), "image")
    assert (facts.format, facts.width, facts.height, facts.is_baseline) == ("HEIF", 64, 48, False)


def test_too_large_a_picture_is_refused() -> None:
    with pytest.raises(ImageError, match="too large"):
        decode_image(read("plain"), "image", Limits(1000, 4096))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def photograph(
    *, items: int = 3, tiles: int = 2, size: tuple[int, int] = (64, 64), wide: bool = False, last: bytes = b""
) -> bytes:
    """Return the boxes of a file without its pictures, with one more box at the end of `meta`."""
    sizes = box(b"iprp", box(b"ipco", box(b"ispe", struct.pack(">4xII", *size))))
    count = struct.pack(">B3xI" if wide else ">B3xH", int(wide), items)
    grid = box(b"dimg", struct.pack(">IH" if wide else ">HH", 1, tiles) + bytes((4 if wide else 2) * tiles))
    other = box(b"thmb", struct.pack(">HH", 1, 60_000))
    references = box(b"iref", struct.pack(">B3x", int(wide)) + other + grid)
    return box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(
        b"meta", bytes(4) + box(b"iinf", count) + references + sizes + last
    )


@pytest.mark.parametrize("wide", [False, True])
def test_items_and_tiles_are_counted(wide: bool) -> None:
    assert inspect(memoryview(photograph(wide=wide)), "image").width == 64
    inspect(memoryview(photograph(items=MAX_ITEMS, tiles=65, wide=wide)), "image")
    with pytest.raises(ImageError, match="items"):
        inspect(memoryview(photograph(items=MAX_ITEMS + 1, wide=wide)), "image")
    with pytest.raises(ImageError, match="tiles for 64x64 pixels"):
        inspect(memoryview(photograph(tiles=66, wide=wide)), "image")
    inspect(memoryview(photograph(tiles=192, size=(8064, 6048), wide=wide)), "image")  # 48 megapixels of a telephone


def nested(*grids: tuple[int, list[int]], size: tuple[int, int] = (64, 64), wide: bool = False) -> memoryview:
    """Return the boxes of a file in which items are made of others: (item, its sources)."""
    letter = "I" if wide else "H"
    boxes = [
        box(b"dimg", struct.pack(f">{letter}H{len(sources)}{letter}", item, len(sources), *sources))
        for item, sources in grids
    ]
    references = box(b"iref", struct.pack(">B3x", int(wide)) + b"".join(boxes))
    sizes = box(b"iprp", box(b"ipco", box(b"ispe", struct.pack(">4xII", *size))))
    return memoryview(box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", bytes(4) + references + sizes))


@pytest.mark.parametrize("wide", [False, True])
def test_tiles_of_grids_in_grids_are_counted(wide: bool) -> None:
    tiles = list(range(10, 18))
    inspect(nested((1, [2] * 8), (2, tiles), wide=wide), "image")  # 64 pictures; 65 are allowed
    for grids in (((1, [2] * 9), (2, tiles)), ((2, tiles), (1, [2] * 9))):  # 17 references, 72 pictures
        with pytest.raises(ImageError, match="tiles for 64x64 pixels; this server allows at most 65"):
            inspect(nested(*grids, wide=wide), "image")
    inspect(nested((1, [2] * 9), (2, tiles), size=(512, 512), wide=wide), "image")


def test_items_inside_one_another_have_few_levels() -> None:
    chain = [(number, [number + 1]) for number in range(1, 1 + MAX_LEVELS)]
    inspect(nested(*chain), "image")
    longer = [*chain, (1 + MAX_LEVELS, [99])]
    for grids in (longer, longer[::-1], [(1, [2]), (2, [1])], [(1, [1])]):
        with pytest.raises(ImageError, match="levels of items in one another"):
            inspect(nested(*grids), "image")


def test_boxes_that_cannot_be_counted_are_no_way_around_the_counts() -> None:
    with pytest.raises(ImageError):
        inspect(memoryview(photograph(tiles=5000, last=box(b"iinf", b""))), "image")


def test_damaged_file_is_an_image_error() -> None:
    data = read("plain")
    for end in range(0, len(data), 20):
        with pytest.raises(ImageError):
            decode_image(data[:end], "image", LIMITS)
    damaged = bytearray(data)
    for at in range(40, len(data), 7):
        damaged[at] ^= 0xFF
        try:
            decode_image(bytes(damaged), "image", LIMITS)
            inspect(memoryview(damaged), "image")
        except ImageError:
            pass
        damaged[at] ^= 0xFF


def test_without_the_package_no_file_is_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_heic(read("plain")[:64])
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    assert not reads_heic()
    assert not is_heic(read("plain")[:64])
    with pytest.raises(ImageError, match="of the extra heic is not installed"):
        read_head(memoryview(read("plain")), "image", Settings())
