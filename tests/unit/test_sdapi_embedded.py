"""The text in image files: read from files of Pillow and of our encoder, and from any bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ovserve.api.sdapi.embedded import MAX_TEXT_BYTES, PARAMETERS, parse_infotext, read_texts
from ovserve.pixels.images import encode_image

BLANK = np.zeros((4, 4, 3), np.uint8)
TEXT = "a cat, čau\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x32"


def png_with(*texts: tuple[str, str, bool], wide: bool = True) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text, is_compressed in texts:
        (info.add_itxt if wide else info.add_text)(key, text, zip=is_compressed)
    buffer = io.BytesIO()
    Image.fromarray(BLANK).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_parameters_of_our_own_files_are_read(form: str) -> None:
    data = encode_image(BLANK, form, 90, TEXT)
    assert read_texts(memoryview(data)) == {PARAMETERS: TEXT}


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("is_compressed", [True, False])
def test_every_kind_of_png_text_is_read(wide: bool, is_compressed: bool) -> None:
    data = png_with(("parameters", "plain text", is_compressed), ("Title", "é", is_compressed), wide=wide)
    assert read_texts(memoryview(data)) == {"parameters": "plain text", "Title": "é"}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("code", "encoding"), [(b"UNICODE\0", "utf-16"), (b"ASCII\0\0\0", "ascii"), (b"\0" * 8, "utf-8")]
)
def test_comments_of_other_programs_are_read(order: str, code: bytes, encoding: str) -> None:
    text = "a cat, Steps: 5"
    wide = "utf-16-le" if order == "<" else "utf-16-be"
    comment = code + text.encode(wide if encoding == "utf-16" else encoding)
    magic = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    first = struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0)
    second = struct.pack(f"{order}HHHIII", 1, 0x9286, 7, len(comment), 26 + 18, 0)
    buffer = io.BytesIO()
    Image.fromarray(BLANK).save(buffer, "JPEG", exif=b"Exif\0\0" + magic + first + second + comment)
    assert read_texts(memoryview(buffer.getvalue())) == {PARAMETERS: text}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def test_compressed_text_is_limited() -> None:
    bomb = zlib.compress(b"x" * (MAX_TEXT_BYTES + 1))
    fits = zlib.compress(b"y" * MAX_TEXT_BYTES)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"bomb\0\0" + bomb) + chunk(b"zTXt", b"fits\0\0" + fits)
    assert read_texts(memoryview(data)).keys() == {"fits"}


def test_damaged_text_does_not_hide_the_others() -> None:
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"a\0\0junk") + chunk(b"tEXt", b"b\0text") + b"cut"
    assert read_texts(memoryview(data)) == {"b": "text"}


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF\0\0\0\0WEBP", b""])
@given(rest=st.binary(max_size=200))
def test_any_bytes_give_a_result(start: bytes, rest: bytes) -> None:
    assert isinstance(read_texts(memoryview(start + rest)), dict)


@given(data=st.sampled_from([encode_image(BLANK, form, 90, TEXT) for form in ("png", "jpeg", "webp")]), draw=st.data())
def test_damaged_files_give_a_result(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    damaged = data[:at] + draw.draw(st.binary(max_size=6)) + data[at + draw.draw(st.integers(0, 8)) :]
    assert isinstance(read_texts(memoryview(damaged)), dict)


# --- the text of parameters -------------------------------------------------------------------------------------------


def test_text_is_split_into_its_fields() -> None:
    assert parse_infotext(TEXT) == {
        "Prompt": "a cat, čau",
        "Negative prompt": "dog",
        "Steps": "20",
        "Sampler": "Euler a",
        "CFG scale": "7",
        "Seed": "5",
        "Size-1": "64",
        "Size-2": "32",
    }


def test_quoted_values_are_read() -> None:
    found = parse_infotext('"one\\ntwo"\nSteps: 1, Seed: 2, Model: "a, b: c", Version: x')
    assert (found["Prompt"], found["Model"], found["Version"]) == ("one\ntwo", "a, b: c", "x")


def test_text_without_pairs_is_a_prompt() -> None:
    assert parse_infotext("a cat\non a mat") == {"Prompt": "a cat\non a mat", "Negative prompt": ""}
    assert parse_infotext("") == {"Prompt": "", "Negative prompt": ""}


@given(text=st.text(max_size=200))
def test_any_text_is_parsed(text: str) -> None:
    assert {"Prompt", "Negative prompt"} <= parse_infotext(text).keys()


def test_parsing_takes_linear_time() -> None:
    parse_infotext('a: "' + "\\" * 1_000_000)
    parse_infotext("a:" * 300_000)
    parse_infotext("a b " * 250_000)
