"""Tests of read_form with multipart bodies: uploads, text and its charsets, limits, and released segments."""

from __future__ import annotations

import base64
import quopri
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import (
    ApiError,
    BadRequest,
    ClientGone,
    ContentTooLarge,
    InvalidType,
    InvalidValue,
    PartTooLarge,
    SpoolFull,
    UnsupportedMediaType,
)
from ovserve.front.forms.form import read_form
from ovserve.front.forms.spooled import SpooledForm
from ovserve.wire.local.spool import Spool
from tests.bodies import MemoryBody, Part, build, settings

MULTIPART = "multipart/form-data; boundary=B0"
CASES = Path(__file__).parent.parent / "data" / "cases"
PNG = b"\x89PNG\r\n\x1a\n\0\0"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 64 << 20)
    yield spool
    assert spool.used_bytes == 0
    spool.close()


def read(spool: Spool, *parts: Part, content_type: str | None = MULTIPART, **options: Any) -> SpooledForm:
    return read_form(MemoryBody(build(parts, "B0")), content_type, spool, settings(**options))


def contents_of(form: SpooledForm) -> tuple[list[tuple[str, Any]], list[tuple[str, str | None, bytes]]]:
    """Return the fields, and the uploads with their bytes, and release the form."""
    uploads = [(upload.name, upload.filename, bytes(upload.view())) for upload in form.uploads]
    assert all(upload.size == len(data) for upload, (_, _, data) in zip(form.uploads, uploads, strict=True))
    fields = list(form.fields)
    form.release()
    return fields, uploads


def test_fields_and_uploads_keep_names_values_and_order(spool: Spool) -> None:
    fields, uploads = contents_of(
        read(
            spool,
            Part("mask", PNG, "m.png", "image/png"),
            Part("loras[]", b"one"),
            Part("image[]", b"1", "a.png", "image/png"),
            Part("loras[]", b"two"),
            Part("image[]", b"2", "b.png", "image/png"),
            Part("lora_alphas[styles/a.safetensors]", b"0.8"),
            Part("empty", b""),
            Part("prompt", "kočka\r\nand 🎩".encode()),
        )
    )
    assert fields == [
        ("loras[]", "one"),
        ("loras[]", "two"),
        ("lora_alphas[styles/a.safetensors]", "0.8"),
        ("empty", ""),
        ("prompt", "kočka\r\nand 🎩"),
    ]
    assert uploads == [("mask", "m.png", PNG), ("image[]", "a.png", b"1"), ("image[]", "b.png", b"2")]


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "images", "images[]", "images[1]", "mask", "mask[]"])
@pytest.mark.parametrize(
    ("filename", "content_type", "is_upload"),
    [
        ("cat.png", "image/png", True),
        ("cat.png", None, True),  # requests sends no type
        ("cat.txt", "text/plain", True),
        (None, "image/png", True),  # openai-python: (None, bytes, type)
        (None, "application/octet-stream", True),
        (None, None, False),  # a string instead of a file: the API rejects it
        (None, "text/plain; charset=utf-8", False),  # aiohttp sends strings this way
    ],
)
def test_the_name_decides_whether_a_part_is_a_picture(
    spool: Spool, name: str, filename: str | None, content_type: str | None, is_upload: bool
) -> None:
    fields, uploads = contents_of(read(spool, Part(name, b"text", filename, content_type)))
    assert (fields, uploads) == (([], [(name, filename, b"text")]) if is_upload else ([(name, "text")], []))


@pytest.mark.parametrize("name", ["prompt", "imagery", "image2", "unmask", "image[0][1]", "meta"])
@pytest.mark.parametrize(
    ("filename", "content_type"),
    [(None, None), ("prompt.txt", "text/plain"), ("blob", "application/octet-stream"), (None, "application/json")],
)
def test_parts_with_other_names_are_text(
    spool: Spool, name: str, filename: str | None, content_type: str | None
) -> None:
    assert contents_of(read(spool, Part(name, b'{"a":1}', filename, content_type))) == ([(name, '{"a":1}')], [])


@pytest.mark.parametrize("name", ["image", "mask", "image[]", "prompt", "other"])
def test_an_empty_part_with_an_empty_file_name_is_left_out(spool: Spool, name: str) -> None:
    parts = (Part(name, b"", "", "application/octet-stream"), Part("size", b"auto"))
    assert contents_of(read(spool, *parts)) == ([("size", "auto")], [])


def test_bytes_with_an_empty_file_name_and_empty_files_with_a_name_are_kept(spool: Spool) -> None:
    _, uploads = contents_of(read(spool, Part("image", PNG, "", "image/png"), Part("mask", b"", "m.png", "image/png")))
    assert uploads == [("image", "", PNG), ("mask", "m.png", b"")]


@pytest.mark.parametrize(
    ("body", "filename"),
    [
        ("latin1.body", "café.png"),
        ("form-data-4.0.0-quotes.body", 'my "red" circle.png'),
        ("browser_form.body", "a.png"),  # with an unused file input for a mask
    ],
)
def test_forms_of_real_clients_with_odd_file_names_are_read(spool: Spool, body: str, filename: str) -> None:
    data = (CASES / body).read_bytes()
    form = read_form(MemoryBody(data), "multipart/form-data; boundary=B", spool, settings())
    _, uploads = contents_of(form)
    assert [(name, sent) for name, sent, _ in uploads] == [("image", filename)]
    assert uploads[0][2].startswith(b"\x89PNG")


def test_binary_or_long_files_under_other_names_are_uploads(spool: Spool) -> None:
    fields, uploads = contents_of(
        read(spool, Part("markup", PNG, "m.png"), Part("file", b"x" * 100, "long.txt"), max_text_field_bytes=50)
    )
    assert not fields
    assert uploads == [("markup", "m.png", PNG), ("file", "long.txt", b"x" * 100)]


def test_an_empty_file_is_an_upload_of_zero_bytes(spool: Spool) -> None:
    assert contents_of(read(spool, Part("image", b"", "empty.png"))) == ([], [("image", "empty.png", b"")])


def test_text_is_accepted_up_to_its_limit(spool: Spool) -> None:
    assert contents_of(read(spool, Part("prompt", b"x" * 100), max_text_field_bytes=100))[0] == [("prompt", "x" * 100)]
    with pytest.raises(PartTooLarge) as caught:
        read(spool, Part("prompt", b"x" * 101), max_text_field_bytes=100)
    assert (caught.value.status, caught.value.param) == (413, "prompt")


def test_long_text_is_refused_before_it_is_received_completely(spool: Spool) -> None:
    body = MemoryBody(build([Part("prompt", b"x" * (4 << 20))], "B0"))
    with pytest.raises(PartTooLarge):
        read_form(body, MULTIPART, spool, settings(max_text_field_bytes=1000))
    assert body.given <= 1 << 20


@pytest.mark.parametrize("name", ["image", "image[]", "mask"])
@pytest.mark.parametrize("size", [1500, 4 << 20])
def test_a_data_url_instead_of_a_file_gets_a_specific_error(spool: Spool, name: str, size: int) -> None:
    body = MemoryBody(build([Part(name, b"data:image/png;base64," + b"A" * size)], "B0"))
    with pytest.raises(InvalidType, match="expected a file") as caught:
        read_form(body, MULTIPART, spool, settings(max_text_field_bytes=1000))
    assert (caught.value.status, caught.value.param) == (400, name)
    assert body.given <= 1 << 20


def test_text_must_be_utf_8_and_the_error_names_the_field(spool: Spool) -> None:
    with pytest.raises(InvalidValue, match="'prompt' is not UTF-8") as caught:
        read(spool, Part("n", b"1"), Part("prompt", b"gr\xfcn"))
    assert caught.value.param == "prompt"
    assert "part 2" in caught.value.message


@pytest.mark.parametrize(
    ("charset", "data", "text"),
    [
        ("ISO-8859-1", b"gr\xfcn \x80", "grün \x80"),
        ("latin1", b"gr\xfcn", "grün"),
        ('"windows-1252"', b"gr\xfcn \x80", "grün €"),
        ("us-ascii", b"green", "green"),
    ],
)
def test_text_is_decoded_with_the_declared_charset(spool: Spool, charset: str, data: bytes, text: str) -> None:
    assert contents_of(read(spool, Part("prompt", data, None, f"text/plain; charset={charset}")))[0] == [
        ("prompt", text)
    ]


@pytest.mark.parametrize("content_type", ["text/plain; charset=UTF-8", 'text/plain;charset="us-ascii"', "text/plain"])
def test_utf_8_and_its_subsets_are_accepted(spool: Spool, content_type: str) -> None:
    assert contents_of(read(spool, Part("prompt", b"x", None, content_type)))[0] == [("prompt", "x")]


@pytest.mark.parametrize("encoding", ["binary", "8bit", "7BIT"])
def test_identity_encodings_are_ignored(spool: Spool, encoding: str) -> None:
    part = Part("image", PNG, "a.png", fields=(f"Content-Transfer-Encoding: {encoding}",))
    assert contents_of(read(spool, part))[1] == [("image", "a.png", PNG)]


def test_base64_parts_are_decoded_in_place(spool: Spool) -> None:
    data = bytes(range(256)) * 1000
    line = ("Content-Transfer-Encoding: BASE64",)
    fields, uploads = contents_of(
        read(
            spool,
            Part("image", base64.encodebytes(data).replace(b"\n", b"\r\n"), "a.png", fields=line),
            Part("prompt", base64.b64encode("grün".encode()), fields=line),
            Part("mask", b"", "b.png", fields=line),
        )
    )
    assert fields == [("prompt", "grün")]
    assert uploads == [("image", "a.png", data), ("mask", "b.png", b"")]


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b"gr=C3=BCn und =\r\nblau =3D t=C3=BCrkis", "grün und blau = türkis"),
        (quopri.encodestring("é €\r\n".encode() * 100), "é €\r\n" * 100),
        (b"not encoded", "not encoded"),
        (b"", ""),
    ],
)
def test_quoted_printable_text_is_decoded(spool: Spool, sent: bytes, text: str) -> None:
    part = Part("prompt", sent, fields=("Content-Transfer-Encoding: Quoted-Printable",))
    assert contents_of(read(spool, part, Part("n", b"1")))[0] == [("prompt", text), ("n", "1")]


def test_limit_of_a_text_field_applies_to_the_decoded_text(spool: Spool) -> None:
    line = ("Content-Transfer-Encoding: quoted-printable",)
    for size, is_accepted in ((100, True), (101, False)):
        part = Part("prompt", quopri.encodestring(b"\xc3\xbc" * (size // 2) + b"x" * (size % 2)), fields=line)
        if is_accepted:
            read(spool, part, max_text_field_bytes=100).release()
        else:
            with pytest.raises(PartTooLarge, match="longer than 100 bytes"):
                read(spool, part, max_text_field_bytes=100)


def test_urlencoded_body_is_400_with_a_hint(spool: Spool) -> None:
    with pytest.raises(
        BadRequest, match=r"cannot contain a picture; send multipart/form-data .* -F name=value"
    ) as caught:
        read_form(MemoryBody(b"x"), "application/x-www-form-urlencoded; charset=utf-8", spool, settings())
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "content_type", ["Multipart/Form-Data; BOUNDARY=B0", "multipart/form-data; boundary=other; boundary=B0"]
)
def test_the_last_boundary_is_used(spool: Spool, content_type: str) -> None:
    assert contents_of(read(spool, Part("prompt", b"x"), content_type=content_type))[0] == [("prompt", "x")]


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/octet-stream", "image/png"])
def test_other_types_get_415_with_the_supported_types(spool: Spool, content_type: str | None) -> None:
    body = MemoryBody(b"x")
    with pytest.raises(UnsupportedMediaType, match="multipart/form-data or application/json") as caught:
        read_form(body, content_type, spool, settings())
    assert caught.value.status == 415
    assert body.given == 0


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Part("image", b"x", "a", "multipart/mixed; boundary=x"), "nested multipart/mixed"),
        (Part("image", b"x", "a", "image"), None),
        (Part("image", b"x", "a", "image/"), "Content-Type"),
        (Part("prompt", b"x", None, "text/plain; charset=utf-16"), "charset 'utf-16' is not supported; send UTF-8"),
        (Part("prompt", b"a\x81", None, "text/plain; charset=windows-1252"), "'prompt' is not windows-1252 text"),
        (Part("prompt", b"x", fields=("Content-Transfer-Encoding: x-uuencode",)), "'x-uuencode'"),
        (Part("image", b"x", "a", fields=("Content-Transfer-Encoding: quoted-printable",)), "'quoted-printable'"),
        (Part("image", b"!", "a", fields=("Content-Transfer-Encoding: base64",)), "invalid base64"),
    ],
)
def test_unsupported_encodings_types_and_charsets_of_parts_are_refused(
    spool: Spool, part: Part, words: str | None
) -> None:
    if words is None:
        read(spool, part).release()
        return
    with pytest.raises(InvalidValue, match=re.escape(words)) as caught:
        read(spool, part)
    assert caught.value.param == part.name


def test_json_in_another_charset_is_refused(spool: Spool) -> None:
    with pytest.raises(UnsupportedMediaType, match="JSON is UTF-8"):
        read(spool, content_type="application/json; charset=utf-16")


def test_a_body_over_the_limit_is_refused(spool: Spool) -> None:
    body = MemoryBody(build([Part("image", b"x" * 5000, "a")], "B0"), announced=False)
    with pytest.raises(ContentTooLarge):
        read_form(body, MULTIPART, spool, settings(max_body_bytes=4096))


class BrokenBody(MemoryBody):
    """A body whose second read raises: the client disconnects, or the spool is full."""

    def __init__(self, data: bytes, error: Exception, after: int) -> None:
        super().__init__(data, [after])
        self.error = error

    def readinto(self, view: memoryview, /) -> int:
        if self.given:
            raise self.error
        return super().readinto(view)


@pytest.mark.parametrize("after", [1, 10, 60, 100, 5000])
@pytest.mark.parametrize("error", [ClientGone("gone"), SpoolFull("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("content_type", [MULTIPART, "application/json"])
def test_an_incomplete_body_releases_its_segment(spool: Spool, error: Exception, after: int, content_type: str) -> None:
    body = BrokenBody(build([Part("image", b"x" * 9000, "a")], "B0"), error, after)
    with pytest.raises(type(error)):
        read_form(body, content_type, spool, settings())
    assert spool.used_bytes == 0
    assert [path.name for path in spool.directory.iterdir()] == ["lock"]


def test_a_refused_body_releases_its_segment(spool: Spool) -> None:
    for content_type in (MULTIPART, "application/json"):
        with pytest.raises(BadRequest):
            read_form(MemoryBody(b"\xff" * 500_000), content_type, spool, settings())
        assert spool.used_bytes == 0
        assert [path.name for path in spool.directory.iterdir()] == ["lock"]


def test_content_type_is_checked_before_the_body_is_read(spool: Spool) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=", "text/plain", "a;b"):
        body = MemoryBody(b"x" * 100)
        with pytest.raises(ApiError):
            read_form(body, content_type, spool, settings())
        assert body.given == 0


def test_a_form_is_released_while_a_view_is_still_held(spool: Spool) -> None:
    form = read(spool, Part("image", PNG, "a.png"))
    view = form.uploads[0].view()
    form.release()
    assert [path.name for path in spool.directory.iterdir()] == ["lock"]
    view.release()
