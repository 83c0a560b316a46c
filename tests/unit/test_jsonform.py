"""Tests of JSON bodies: data URLs become uploads, other members become fields with their JSON type, text is limited."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import math
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from PIL import Image

from ovserve.errors import ApiError, BadRequest, InvalidValue, PartTooLarge, TooManyParts, UnknownParameter
from ovserve.front.forms.form import read_form
from ovserve.front.forms.jsonform import decode_in_place
from ovserve.front.forms.spooled import SpooledForm
from ovserve.wire.local.spool import Spool
from tests.bodies import MemoryBody, settings

PNG = b"\x89PNG\r\n\x1a\n\0\0\xff\xfe"
BARE = base64.b64encode(PNG).decode()
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 256 << 20)
    yield spool
    assert spool.used_bytes == 0
    spool.close()


def read(spool: Spool, document: Any, **options: Any) -> SpooledForm:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return read_form(MemoryBody(data), "application/json; charset=UTF-8", spool, settings(**options))


def contents_of(form: SpooledForm) -> tuple[list[tuple[str, Any]], list[tuple[str, bytes]]]:
    assert form.is_json
    uploads = [(upload.name, bytes(upload.view())) for upload in form.uploads]
    assert all(upload.filename is None for upload in form.uploads)
    fields = list(form.fields)
    form.release()
    return fields, uploads


def test_fields_keep_their_types_and_order(spool: Spool) -> None:
    document = {
        "prompt": "kočka 🎩",
        "n": 2,
        "strength": 0.5,
        "stream": True,
        "seed": None,
        "loras": ["a", "b"],
        "svg": {"reasoning": {"effort": "low"}},
        "big": 2**70,
    }
    fields, uploads = contents_of(read(spool, document))
    assert fields == list(document.items())
    assert [type(value) for _, value in fields] == [type(value) for value in document.values()]
    assert not uploads


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_bare_base64_of_every_format_is_a_picture_of_any_size(spool: Spool, form: str) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(stream, form, **({"big_endian": True} if form == "TIFF" else {}))
    data = stream.getvalue()
    text = base64.b64encode(data).decode()
    for written in (text, text.replace("/", "\\/")):
        body = b'{"prompt": "x", "image": "%b"}' % written.encode()
        fields, uploads = contents_of(read(spool, body, max_json_text_bytes=1024))
        assert fields == [("prompt", "x")]
        assert uploads == [("image", data)]


@pytest.mark.parametrize(
    ("document", "fields", "uploads"),
    [
        ({"images": [{"image_url": URL}, {"image_url": URL}]}, [], ["images[0]", "images[1]"]),
        ({"images": [URL]}, [], ["images[0]"]),
        ({"init_images": [URL, URL]}, [], ["init_images[0]", "init_images[1]"]),  # AUTOMATIC1111's API
        ({"images": {"image_url": URL}}, [], ["images"]),
        ({"image": URL, "mask": {"image_url": URL}}, [], ["image", "mask"]),
        ({"image": [URL, URL], "mask": URL}, [], ["image[0]", "image[1]", "mask"]),
        ({"images": [{"image_url": URL, "file_id": None}]}, [], ["images[0]"]),
        ({"images": [{"image_url": {"url": URL}}]}, [], ["images[0]"]),  # as in chat completions
        ({"image": {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}}, [], ["image"]),
        (
            {"images": [{"image_url": URL, "detail": "low"}, {"image_url": URL, "detail": "high"}]},
            [],
            ["images[0]", "images[1]"],
        ),
        ({"mask": {"type": "input_image", "image_url": URL}}, [], ["mask"]),  # as in responses
        ({"markup": URL}, [], ["markup"]),
        ({"images": []}, [("images", [])], []),
        ({"image": None}, [("image", None)], []),
        ({"image": "https://example.org/a.png"}, [("image", "https://example.org/a.png")], []),
        ({"images": [{"file_id": "f"}, {"image_url": URL}]}, [("images[0]", {"file_id": "f"})], ["images[1]"]),
        (
            {"images": [{"image_url": {"url": "x"}}, 5]},
            [("images[0]", {"image_url": {"url": "x"}}), ("images[1]", 5)],
            [],
        ),
        ({"prompt": "data: the android"}, [("prompt", "data: the android")], []),
        ({"prompt": 'data:"quoted\\" and more'}, [("prompt", 'data:"quoted\\" and more')], []),
        ({"prompt": "data:\\"}, [("prompt", "data:\\")], []),
        ({"user": {"a": ["data:x"]}}, [("user", {"a": ["data:x"]})], []),
        ({"image": BARE}, [], ["image"]),
        ({"images": [BARE, {"image_url": BARE}, {"url": URL}]}, [], ["images[0]", "images[1]", "images[2]"]),
        ({"image": {"url": URL}, "mask": {"b64_json": BARE}}, [], ["image", "mask"]),
        ({"image_url": URL}, [], ["image_url"]),
        ({"image_url": {"url": URL, "detail": "low"}}, [], ["image_url"]),
        ({"prompt": BARE}, [("prompt", BARE)], []),
        ({"prompt": "R0lGOD lettering"}, [("prompt", "R0lGOD lettering")], []),
        ({"image": "QUJD"}, [("image", "QUJD")], []),  # in no format that is read
    ],
)
def test_pictures_become_uploads_and_other_members_fields(
    spool: Spool, document: dict[str, Any], fields: list[tuple[str, Any]], uploads: list[str]
) -> None:
    assert contents_of(read(spool, document)) == (fields, [(name, PNG) for name in uploads])


@pytest.mark.parametrize(
    "prefix",
    [
        "data:image/png;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:;base64,",
        "data:image/png;name=a.png;base64,",
        "data:image\\/png;base64,",
    ],
)
def test_prefixes_of_data_urls_are_accepted(spool: Spool, prefix: str) -> None:
    document = b'{"image":"%b%b"}' % (prefix.encode(), base64.b64encode(PNG))
    assert contents_of(read(spool, document))[1] == [("image", PNG)]


def dot_net(text: str) -> str:
    return text.replace("+", "\\u002B").replace("/", "\\u002f").replace("=", "\\u003D")


def php(text: str) -> str:
    return text.replace("/", "\\/")


def lines(text: str) -> str:
    return "\\r\\n".join(text[at : at + 76] for at in range(0, len(text), 76))


def unpadded(text: str) -> str:
    return text.rstrip("=")


@pytest.mark.parametrize("escape", [str, dot_net, php, lines, unpadded], ids=lambda escape: escape.__name__)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 48 * 1024 - 1, 48 * 1024, 200_003])
def test_base64_is_decoded_with_the_escapes_of_all_encoders(
    spool: Spool, escape: Callable[[str], str], size: int
) -> None:
    data = (b"\xfb\xef\xbe\xff\xff\xff" + bytes(range(256))) * (size // 200 + 1)
    data = data[:size]
    text = escape(base64.b64encode(data).decode())
    document = b'{"image":"data:image/png;base64,%b","n":1}' % text.encode()
    assert contents_of(read(spool, document)) == ([("n", 1)], [("image", data)])


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=8), st.sampled_from(["\r\n", "\n", " ", "\t"]))
def test_decode_in_place_gives_the_encoded_data(data: bytes, breaks: list[int], blank: str) -> None:
    text = base64.b64encode(data).decode()
    for at in sorted(breaks, reverse=True):
        text = text[:at] + blank + text[at:]
    buffer = bytearray(b"before" + text.encode() + b"after")
    with memoryview(buffer) as view:
        assert decode_in_place(view, 6, len(text), "image") == len(data)
    assert buffer[: 6 + len(data)] == b"before" + data
    assert buffer.endswith(b"after")


def test_padding_in_the_middle_of_a_long_text_is_refused() -> None:
    text = bytearray(b"QUJD" * 16_383 + b"QQ==" + b"QUJD" * 100)
    with memoryview(text) as view, pytest.raises(InvalidValue, match="padding"):
        decode_in_place(view, 0, len(text), "image")


def test_a_large_data_url_is_not_copied_to_the_heap(spool: Spool) -> None:
    data = bytes(16 << 20)
    body = MemoryBody(b'{"images":[{"image_url":"data:image/png;base64,%b"}]}' % base64.b64encode(data))
    tracemalloc.start()
    form = read_form(body, "application/json", spool, settings())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert form.uploads[0].view() == data
    form.release()
    assert most < 2 << 20


def test_text_is_accepted_up_to_its_limits(spool: Spool) -> None:
    document = b'{"prompt":"%b"}' % (b"x" * 1500)
    form = read(spool, document, max_json_text_bytes=len(document), max_text_field_bytes=1500)
    assert contents_of(form)[0] == [("prompt", "x" * 1500)]
    for options in ({"max_json_text_bytes": len(document) - 1}, {"max_text_field_bytes": 1499}):
        with pytest.raises(PartTooLarge) as caught:
            read(spool, document, **options)
        assert caught.value.status == 413


def test_text_that_begins_like_a_data_url_counts_as_text(spool: Spool) -> None:
    prompt = "data:" + "x" * 1500 + '"'
    document = json.dumps({"prompt": prompt}).encode()
    assert contents_of(read(spool, document, max_json_text_bytes=len(document)))[0] == [("prompt", prompt)]
    with pytest.raises(PartTooLarge, match="bytes of text outside"):
        read(spool, document, max_json_text_bytes=len(document) - 1)


@pytest.mark.parametrize("behind", [b"", b" " * 3, b" " * 30])
def test_text_around_a_data_url_is_accepted_up_to_its_limit(spool: Spool, behind: bytes) -> None:
    before = b'{"a":"%b","image":' % (b"x" * 1500)
    document = before + b'"%b"' % URL.encode() + behind + b"}"
    text = len(before) + len(behind) + 1
    assert contents_of(read(spool, document, max_json_text_bytes=text))[1] == [("image", PNG)]
    for limit in (text - 1, len(before) - 1):
        with pytest.raises(PartTooLarge, match=f"more than {limit} bytes of text"):
            read(spool, document, max_json_text_bytes=limit)


def test_data_urls_do_not_count_as_text(spool: Spool) -> None:
    document = {"image": "data:;base64," + "QUJD" * 1000, "prompt": "x"}
    assert contents_of(read(spool, document, max_json_text_bytes=1024))[1] == [("image", b"ABC" * 1000)]


def test_data_urls_are_limited_like_parts(spool: Spool) -> None:
    def urls(count: int) -> dict[str, Any]:
        return {"images": [URL] * count}

    assert len(contents_of(read(spool, urls(5), max_parts=5))[1]) == 5
    with pytest.raises(TooManyParts, match="more than 5 pictures"):
        read(spool, urls(6), max_parts=5)


@pytest.mark.parametrize(
    "unit",
    [b'"",', b'"\\"",', b"[],", b'"data",', b'{"a":"b"},', b'"\\\\",', b'"data:\\"",', b"\\", b'"', b" "],
    ids=repr,
)
def test_time_grows_linearly_with_the_text(spool: Spool, unit: bytes) -> None:
    def seconds(size: int) -> float:
        document = b'{"a":[' + unit * (size // len(unit)) + b"1]}"
        gc.disable()  # many lists trigger a collection, which would also scan the objects of earlier tests
        try:
            begun = time.thread_time()
            with contextlib.suppress(BadRequest):
                read(spool, document, max_json_text_bytes=8 << 20, max_text_field_bytes=8 << 20).release()
            return time.thread_time() - begun
        finally:
            gc.enable()

    for attempt in range(3):  # the machine may be busy; quadratic time takes 16 times as long in every attempt
        short = min(seconds(50_000 << attempt) for _ in range(3))
        long = min(seconds(200_000 << attempt) for _ in range(3))
        if long <= 9 * short:
            return
    pytest.fail(f"{short * 1e3:.1f} ms, and {long * 1e3:.1f} ms for four times as much")


def test_nesting_is_accepted_up_to_its_limit(spool: Spool) -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    read(spool, nested(100)).release()
    with pytest.raises(BadRequest, match="deeper than 100"):
        read(spool, nested(101))


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        (b"", BadRequest, "empty (byte 0)"),
        (b"[]", BadRequest, "expected an object"),
        (b'{"prompt":"x', BadRequest, "the string at byte 10 has no closing quotation mark"),
        (b'{"prompt":"\xff"}', BadRequest, "not UTF-8 (byte 11)"),
        (b'{"n":1,"n":1}', BadRequest, "the key 'n' is given twice"),
        (b'{"n":1,"x":{"a":1,"b":2,"a":3}}', BadRequest, "the key 'a' is given twice"),
        (b'{"n":NaN}', BadRequest, "NaN is not a JSON value"),
        (b'{"n":1e400}', BadRequest, "the number 1e400 is too large"),
        (b'{"n":' + b"9" * 5000 + b"}", BadRequest, "too many digits"),
        (b'{"n":1 1}', BadRequest, "(byte 7)"),
        (b'{"n":"\\ud800"}', InvalidValue, "n: the text has half of a surrogate pair"),
        (b'{"data:x":1}', BadRequest, "a key must not begin like a picture (byte 2)"),
        (b'{"user":{"data:x":1}}', BadRequest, "a key must not begin like a picture (byte 10)"),
        (b'{"user":"data:\\x"}', BadRequest, "the string at byte 9 is not valid JSON"),
        (b'{"user":"data:' + b"x" * 600 + b'"}', PartTooLarge, "user: longer than 500 bytes (byte 9)"),
        (b'{"user":["' + b"x" * 501 + b'"]}', PartTooLarge, "user: longer than 500 bytes"),
        (b'{"image":"data:image/png,abc"}', InvalidValue, "image: expected data:image/png;base64,"),
        (b'{"image":"\\u0064ata:;base64,AAAA"}', InvalidValue, "image: a data URL must be written without escapes"),
        (b'{"image":"data:;base64,AA\\"AA"}', InvalidValue, "image: a data URL must be written without escapes"),
        (b'{"image":"data:;base64,AAAA', BadRequest, "the string at byte 9 has no closing quotation mark"),
        (b'{"prompt":"data:\\"', BadRequest, "the string at byte 10 has no closing quotation mark"),
        (b'{"image":"data:;base64,A"}', InvalidValue, "image: invalid base64"),
        (
            b'{"image":{"image_url":"data:;base64,AAAA","detail":"most"}}',
            UnknownParameter,
            "image: unsupported 'detail' next to image_url",
        ),
        (
            b'{"image":{"image_url":{"url":"data:;base64,AAAA","size":1}}}',
            UnknownParameter,
            "image.image_url: unsupported 'size' next to url",
        ),
        (
            b'{"image":{"image_url":"data:;base64,AAAA","type":[]}}',
            UnknownParameter,
            "image: unsupported 'type' next to image_url",
        ),
        (b'{"user":' + b" " * 9000 + b"1}", PartTooLarge, "more than 8192 bytes of text outside its pictures"),
        (b'{"user":"' + b"\\\\" * 5000 + b'"}', PartTooLarge, "more than 8192 bytes of text outside its pictures"),
    ],
)
def test_malformed_documents_are_refused_with_the_offset(
    spool: Spool, document: bytes, error: type[ApiError], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        read(spool, document, max_json_text_bytes=8192, max_text_field_bytes=500)


def test_an_escape_across_two_pieces_is_decoded(spool: Spool) -> None:
    for lead in range(64 * 1024 - 12, 64 * 1024 + 4):
        text = "A" * (lead // 4 * 4) + "\\r\\n" * (lead % 4) + dot_net("+///") * 4
        document = b'{"image":"data:;base64,%b"}' % text.encode()
        data = base64.b64decode("A" * (lead // 4 * 4) + "+///" * 4)
        assert contents_of(read(spool, document))[1] == [("image", data)]


def test_brackets_inside_strings_do_not_nest(spool: Spool) -> None:
    document = {"prompt": "[" * 500 + '"' + "{" * 500 + "\\"}
    assert contents_of(read(spool, document))[0] == list(document.items())


def test_an_error_after_a_data_url_has_its_offset_in_the_body(spool: Spool) -> None:
    document = b'{"image":"%b","prompt":nothing}' % URL.encode()
    with pytest.raises(BadRequest) as caught:
        read(spool, document)
    assert f"byte {document.index(b'nothing')}" in caught.value.message


def test_text_in_the_form_of_a_placeholder_stays_text(spool: Spool) -> None:
    document = {"image": URL, "prompt": "0" * 16 + "0", "user": "f" * 17}
    assert contents_of(read(spool, document)) == ([("prompt", "0" * 17), ("user", "f" * 17)], [("image", PNG)])


# No text that begins with `data:`: with an escape in it, it would be refused.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not text.lower().startswith("data:")
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.just("data:x"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@budget(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(texts.filter(lambda name: name not in ("image", "images", "mask", "markup")), values), st.booleans()
)
def test_objects_are_parsed_like_the_standard_library_does(
    spool: Spool, document: dict[str, Any], ascii_only: bool
) -> None:
    fields, uploads = contents_of(read(spool, json.dumps(document, ensure_ascii=ascii_only).encode()))
    assert fields == list(document.items())
    assert not uploads


tokens = st.sampled_from(
    [b'"', b'"a"', b":", b",", b"{", b"}", b"[", b"]", b"1", b"\\", b'"image"',
     b'"data:;base64,', b"QUJD", b"=", b" ", b"null", b"-", b"NaN", b"\xff", b"\\u00"]
)  # fmt: skip


@budget(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(tokens | st.binary(max_size=2), max_size=25).map(b"".join))
@example(b'{"image":"data:;base64,QUJD"')
@example(b'"\\')
def test_random_documents_raise_only_documented_errors(spool: Spool, document: bytes) -> None:
    try:
        form = read(spool, document, max_json_text_bytes=1024)
    except ApiError as error:
        assert error.status in (400, 413)
        # A refused document is not a JSON object with unique keys, or it has a data URL.
        with pytest.raises((ValueError, AssertionError)):
            assert_is_plain_object(document)
    else:
        assert isinstance(json.loads(document), dict)
        form.release()


def assert_is_plain_object(document: bytes) -> None:
    assert isinstance(json.loads(document, object_pairs_hook=unique, parse_constant=refuse), dict)
    assert b"data:" not in document


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    assert all(not isinstance(value, float) or math.isfinite(value) for _, value in pairs)
    return dict(pairs)


def refuse(text: str) -> None:
    raise ValueError(text)
