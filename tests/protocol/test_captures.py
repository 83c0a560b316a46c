"""Captured requests of released clients are parsed: whole, in single bytes and in random pieces."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import ApiError
from ovserve.front.forms.form import read_form
from ovserve.front.forms.spooled import SpooledForm
from ovserve.front.http1.headers import parse_options
from ovserve.wire.local.spool import Spool
from tests.bodies import MemoryBody, Part, content_of, head_and_rest, outcome, pieces_of, settings

FOLDER = Path(__file__).parent / "captures"
CAPTURES = json.loads((FOLDER / "index.json").read_text("utf-8"))["captures"]
MULTIPART = [capture for capture in CAPTURES if "boundary" in capture]

# Hand-written captures that are refused on purpose, with the words of the error.
REFUSED_BY_PARSER = {
    # Bare LF as a line end: RFC 2046 allows only CRLF, and parsers that accept both disagree about the end of content.
    "http.client-py3.11__http_client_bare_lf.http": "neither a line end nor two dashes (byte 8)",
    # Folded field lines: obsolete since RFC 7230, sent by none of the captured clients, read in three ways by servers.
    "http.client-py3.11__http_client_folded_header.http": "folded field line (part 1, byte 41)",
}
REFUSED_BY_FORM = {
    # Several files in a nested multipart/mixed: deprecated by RFC 7578 section 4.3; image[] has the same meaning.
    "curl-7.88.1__nested_mixed.http": ("InvalidValue", "nested multipart/mixed"),
    "curl-7.88.1__data_binary_no_ct.http": ("UnsupportedMediaType", "Content-Type is missing"),
    "curl-7.88.1__no_body_post.http": ("UnsupportedMediaType", "Content-Type is missing"),
    "curl-7.88.1__urlencoded_d.http": ("BadRequest", "application/x-www-form-urlencoded"),
    "requests-2.34.2__requests_urlencoded_no_file.http": ("BadRequest", "application/x-www-form-urlencoded"),
    # The server refuses its Content-Encoding before it reads the body; here the body is read, and is not JSON.
    "requests-2.34.2__requests_gzip_body.http": ("BadRequest", "not UTF-8"),
}


def raw_of(capture: dict[str, Any]) -> bytes:
    return (FOLDER / capture["file"]).read_bytes()


def splits(capture: dict[str, Any]) -> Iterator[list[int]]:
    yield []
    yield [1] * capture["body_length"]
    dice = random.Random(capture["file"])
    for longest in (3, 40, 400):
        yield [dice.randint(1, longest) for _ in range(capture["body_length"])]


def unescaped(wire: str) -> str:
    """Undo the escapes of browsers, curl and httpx, which the index has as they were sent."""
    return wire.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def expected_parts(capture: dict[str, Any]) -> list[tuple[str, str | None, str | None, str]]:
    return [
        (
            unescaped(part["name"]),
            unescaped(part["filename"]) if "filename" in part else None,
            part.get("content_type"),
            part["sha256"],
        )
        for part in capture["parts"]
    ]


def summary_of(parts: list[Part]) -> list[tuple[str, str | None, str | None, str]]:
    return [(part.name, part.filename, part.content_type, hashlib.sha256(part.data).hexdigest()) for part in parts]


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    spool = Spool(tmp_path_factory.mktemp("spool"), 1 << 30)
    yield spool
    spool.close()


def test_every_capture_is_listed() -> None:
    files = {path.name for path in FOLDER.glob("*.http")}
    assert files == {capture["file"] for capture in CAPTURES}
    assert len(files) > 180


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture["file"])
def test_bytes_and_content_match_the_index(capture: dict[str, Any]) -> None:
    raw = raw_of(capture)
    assert hashlib.sha256(raw).hexdigest() == capture["raw_sha256"]
    for sizes in splits({"file": capture["file"], "body_length": len(raw)}):
        content = content_of(raw, sizes)
        assert len(content) == capture["body_length"]
        assert hashlib.sha256(content).hexdigest() == capture["body_sha256"]


@pytest.mark.parametrize("capture", MULTIPART, ids=lambda capture: capture["file"])
def test_content_type_has_the_boundary_of_the_index(capture: dict[str, Any]) -> None:
    main, parameters = parse_options(head_and_rest(raw_of(capture))[0]["content-type"])
    assert (main, parameters["boundary"]) == ("multipart/form-data", capture["boundary"])


@pytest.mark.parametrize("capture", MULTIPART, ids=lambda capture: capture["file"])
def test_parts_match_the_index_in_every_split(capture: dict[str, Any]) -> None:
    content = content_of(raw_of(capture))
    for sizes in splits(capture):
        result = outcome(list(pieces_of(content, sizes)), capture["boundary"])
        if capture["file"] in REFUSED_BY_PARSER:
            assert isinstance(result, tuple)
            assert result[0] == "MalformedRequest"
            assert REFUSED_BY_PARSER[capture["file"]] in result[1]
        else:
            assert isinstance(result, list), result
            assert summary_of(result) == expected_parts(capture)


def is_picture(part: dict[str, Any]) -> bool:
    return bool(re.fullmatch(r"(image|mask)(\[\d*\])?", part["name"]))


def assert_holds_parts(form: SpooledForm, capture: dict[str, Any]) -> None:
    fields = [(unescaped(part["name"]), part["sha256"]) for part in capture["parts"] if not is_picture(part)]
    assert [(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in form.fields] == fields
    pictures = [part for part in capture["parts"] if is_picture(part)]
    assert [(upload.name, hashlib.sha256(upload.view()).hexdigest(), upload.size) for upload in form.uploads] == [
        (part["name"], part.get("decoded_sha256", part["sha256"]), part.get("decoded_length", part["length"]))
        for part in pictures
    ]
    assert not form.is_json


def assert_holds_json(form: SpooledForm, document: dict[str, Any]) -> None:
    expected, pictures = [], []
    for name, value in document.items():
        for label, item in (
            [(f"{name}[{k}]", item) for k, item in enumerate(value)] if name == "images" else [(name, value)]
        ):
            is_url = isinstance(item, dict) and str(item.get("image_url")).startswith("data:")
            (pictures if is_url else expected).append((label, item))
    assert list(form.fields) == expected
    assert [upload.name for upload in form.uploads] == [label for label, _ in pictures]
    assert form.is_json


@pytest.mark.parametrize(
    "capture",
    [capture for capture in CAPTURES if not capture["request_line"].startswith("GET")],
    ids=lambda capture: capture["file"],
)
@pytest.mark.parametrize("longest", [1, 50, 1 << 20])
def test_form_matches_the_index(capture: dict[str, Any], longest: int, spool: Spool) -> None:
    raw = raw_of(capture)
    dice = random.Random(capture["file"])
    sizes = [dice.randint(1, longest) for _ in range(capture["body_length"])]
    body = MemoryBody(content_of(raw), sizes, announced=capture["framing"] != "chunked")
    content_type = head_and_rest(raw)[0].get("content-type")
    refusal = REFUSED_BY_FORM.get(capture["file"])
    if capture["file"] in REFUSED_BY_PARSER:
        refusal = ("MalformedRequest", REFUSED_BY_PARSER[capture["file"]])
    if refusal:
        with pytest.raises(ApiError, match=re.escape(refusal[1])) as caught:
            read_form(body, content_type, spool, settings())
        assert type(caught.value).__name__ == refusal[0]
        assert caught.value.status in (400, 415)
    else:
        form = read_form(body, content_type, spool, settings())
        if "json" in capture:
            assert_holds_json(
                form, json.loads(capture["json"]) if isinstance(capture["json"], str) else capture["json"]
            )
        else:
            assert_holds_parts(form, capture)
        form.release()
    assert spool.used_bytes == 0


# The hand-written malformed requests that `read_form` refuses. The others break the framing or have wrong values.
MALFORMED = {
    "empty_boundary.http": ("MalformedRequest", "boundary"),
    "no_closing_delimiter.http": ("MalformedRequest", "no close delimiter was found"),
    "cut_inside_file.http": ("MalformedRequest", "no close delimiter was found"),
    "empty_body.http": ("MalformedRequest", "no delimiter was found"),
    "boundary_never_occurs.http": ("MalformedRequest", "no delimiter was found"),
    "part_without_name.http": ("MalformedRequest", "without a name"),
    "part_without_disposition.http": ("MalformedRequest", "Content-Disposition is missing"),
    "part_headers_unterminated.http": ("MalformedRequest", "ends inside the head of a part (part 1"),
    "huge_part_header.http": ("MalformedRequest", "longer than 8192 bytes"),
    "many_parts.http": ("TooManyParts", "more than 128 parts"),
    "invalid_utf8_field.http": ("InvalidValue", "'prompt' is not UTF-8"),
    "no_content_type.http": ("UnsupportedMediaType", "missing"),
    # Content with the boundary at the start of a line: two parsers would read it differently, so it is refused.
    "boundary_prefix_in_data.http": ("MalformedRequest", "a delimiter directly follows the head (part 1"),
}


@pytest.mark.parametrize("file", sorted(MALFORMED))
def test_malformed_requests_are_refused(file: str, spool: Spool) -> None:
    raw = (FOLDER / "malformed" / file).read_bytes()
    error, words = MALFORMED[file]
    with pytest.raises(ApiError, match=re.escape(words)) as caught:
        read_form(MemoryBody(content_of(raw)), head_and_rest(raw)[0].get("content-type"), spool, settings())
    assert type(caught.value).__name__ == error
    assert spool.used_bytes == 0


def test_forms_with_wrong_values_reach_the_api(spool: Spool) -> None:
    def read(file: str) -> SpooledForm:
        raw = (FOLDER / "malformed" / file).read_bytes()
        return read_form(MemoryBody(content_of(raw)), head_and_rest(raw)[0]["content-type"], spool, settings())

    forms = [read(f"{name}.http") for name in ("image_is_text_field", "image_empty", "no_parts", "filename_traversal")]
    assert [name for name, _ in forms[0].fields] == ["prompt", "image"]
    assert not forms[0].uploads
    assert [upload.size for upload in forms[1].uploads] == [0]
    assert not forms[2].fields
    assert not forms[2].uploads
    assert "/" in (forms[3].uploads[0].filename or "")
    for form in forms:
        form.release()
