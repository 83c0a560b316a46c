"""Run-length codes of BMP files decode as in Pillow, and in bounded time."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import BmpImagePlugin, Image

from ovserve.pixels import bmp_rle


@pytest.fixture
def registered() -> Iterator[None]:
    bmp_rle.register()
    yield
    Image.register_decoder("bmp_rle", BmpImagePlugin.BmpRleDecoder)


def bmp(codes: bytes, width: int, height: int, bits: int, padding: int = 0) -> bytes:
    """Return a BMP with run-length codes after `padding` bytes."""
    colours = 1 << bits
    palette = b"".join(bytes((index * 7 % 256, index, 255 - index, 0)) for index in range(colours)) + bytes(padding)
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 3 - bits // 4, len(codes), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(codes), 0, 0, offset) + info + palette + codes


def pixels_or_error(data: bytes) -> object:
    try:
        with Image.open(io.BytesIO(data), formats=("BMP",)) as image:
            return np.asarray(image.convert("RGB")).tolist()
    except (ValueError, OSError) as error:
        return str(error)


code = st.one_of(
    st.binary(min_size=2, max_size=2),
    st.tuples(st.integers(1, 9), st.integers(0, 255)).map(bytes),
    st.just(b"\0\0"),
    st.just(b"\0\1"),
    st.tuples(st.just(0), st.just(2), st.integers(0, 4), st.integers(0, 2)).map(bytes),
    st.integers(3, 9).flatmap(
        lambda n: st.binary(min_size=n + n % 2, max_size=n + n % 2).map(lambda b: bytes((0, n)) + b)
    ),
)


@given(
    st.lists(code, max_size=60).map(b"".join),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from([4, 8]),
    st.integers(0, 1),
)
def test_codes_decode_as_in_pillow(codes: bytes, width: int, height: int, bits: int, padding: int) -> None:
    data = bmp(codes, width, height, bits, padding)
    expected = pixels_or_error(data)
    bmp_rle.register()
    try:
        assert pixels_or_error(data) == expected
    finally:
        Image.register_decoder("bmp_rle", BmpImagePlugin.BmpRleDecoder)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("codes", [b"\1\5" * 1000 + b"\0\0", b"\1\5\0\0", b"\0\xff", b"\xff\5" * 4 + b"\0\0"])
def test_a_megapixel_takes_milliseconds(codes: bytes, bits: int) -> None:
    absolute = bytes(256 * bits // 8) if codes == b"\0\xff" else b""
    data = bmp((codes + absolute) * 4000, 1000, 1000, bits)
    with Image.open(io.BytesIO(data)) as image:
        started = time.process_time()
        image.load()
    assert time.process_time() - started < 0.2


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("code", [b"\0\0", b"\0\2\0\0"])
def test_codes_without_a_pixel_are_limited(code: bytes) -> None:
    # Nine of the ten ends of a full row add no pixel either.
    assert isinstance(pixels_or_error(bmp(code * 1035 + b"\x0a\5\0\0" * 10, 10, 10, 8)), list)
    text = "more than 1044 run-length codes without a pixel"
    assert pixels_or_error(bmp(code * 1036 + b"\x0a\5\0\0" * 10, 10, 10, 8)) == text
