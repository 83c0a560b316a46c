"""Tests of the part head parser: heads of real clients are accepted, others are refused with an offset."""

from __future__ import annotations

from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.front.forms.parthead import PartHead, parse_part_head


class Refused(Exception):
    pass


def refuse(what: str, at: int) -> NoReturn:
    raise Refused(what, at)


def parse(*lines: str | bytes) -> PartHead:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    return parse_part_head(b"".join(line + b"\r\n" for line in encoded) + b"\r\n", refuse)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['Content-Disposition: form-data; name="image"; filename="cat.png"', "Content-Type: image/png"],
         PartHead("image", "cat.png", "image/png")),
        (["content-disposition:form-data;name=prompt"], PartHead("prompt")),
        (["Content-Type: text/plain; charset=utf-8", 'CONTENT-DISPOSITION: FORM-DATA; NAME="prompt"'],
         PartHead("prompt", None, "text/plain; charset=utf-8")),
        (['Content-Disposition: form-data; filename="b"; name="a"', "X-A: 1", "X-A: 2"], PartHead("a", "b")),
        (['Content-Disposition: form-data; name="a"', "Content-Transfer-Encoding:  BINARY\t", "Content-Length: 007"],
         PartHead("a", None, None, "binary", 7)),
        (["Content-Disposition: form-data; name=image; filename=cat.png; filename*=utf-8''k%C3%A4t.png"],
         PartHead("image", "cat.png")),
        (["Content-Disposition: form-data; name=image; filename*=UTF-8'en'k%C3%A4t.png"], PartHead("image", "kät.png")),
        (['Content-Disposition: form-data; name="lora_alphas[styles/a.safetensors]"'],
         PartHead("lora_alphas[styles/a.safetensors]")),
        ([r'Content-Disposition: form-data; name="a"; filename="a \"q\" back\\slash.png"'],
         PartHead("a", r'a "q" back\slash.png')),
        ([r'Content-Disposition: form-data; name="a"; filename="a %22q%22 back\slash.png"'],
         PartHead("a", r'a "q" back\slash.png')),
        (['Content-Disposition: form-data; name="kočka"; filename=""', "Content-Type:"], PartHead("kočka", "")),
        (['Content-Disposition: form-data; name="../../etc/passwd"'], PartHead("../../etc/passwd")),
    ],
)  # fmt: skip
def test_heads_of_real_clients_are_parsed(lines: list[str], expected: PartHead) -> None:
    assert parse(*lines) == expected


DISPOSITION = 'Content-Disposition: form-data; name="a"'


@pytest.mark.parametrize(
    ("lines", "what", "at"),
    [
        (["Content-Type: text/plain"], "Content-Disposition is missing", 0),
        ([], "Content-Disposition is missing", 0),
        ([DISPOSITION, " folded"], "folded field line", 42),
        ([DISPOSITION, "X-A"], "field line without a colon", 42),
        ([DISPOSITION, "X-A : 1"], "field name is not a token", 42),
        ([DISPOSITION, "X-A: 1\n2"], "control character 0x0a in a field line", 48),
        ([DISPOSITION, "X-A: 1\0"], "control character 0x00 in a field line", 48),
        ([DISPOSITION, b"X-A: \xff"], "field line is not UTF-8", 47),
        ([DISPOSITION, b"X-A:  \t\xff"], "field line is not UTF-8", 49),
        ([DISPOSITION, DISPOSITION.lower()], "content-disposition is given twice", 42),
        (["X-A: 1", "Content-Disposition: attachment; name=a"], "Content-Disposition is not form-data", 8),
        (["X-A: 1", "Content-Disposition: form-data"], "Content-Disposition without a name", 8),
        (["X-A: 1", "Content-Disposition: form-data; name"], "Content-Disposition: malformed parameter at offset 9", 8),
        (
            [b'Content-Disposition: form-data; name="\xe9"'],
            "Content-Disposition: the name is not UTF-8 or has a control character",
            0,
        ),
        (
            ['Content-Disposition: form-data; name="a\x01"'],
            "Content-Disposition: the name is not UTF-8 or has a control character",
            0,
        ),
        (['Content-Disposition: form-data; name="a"; filename="b\nc"'], "control character 0x0a in a field line", 53),
        ([DISPOSITION, "Content-Length: 1_0"], "Content-Length is not a number", 42),
        ([DISPOSITION, "Content-Length: ١"], "Content-Length is not a number", 42),
        ([DISPOSITION, "Content-Length: " + "9" * 19], "Content-Length is not a number", 42),
    ],
)
def test_malformed_heads_are_refused_with_the_offset(lines: list[str | bytes], what: str, at: int) -> None:
    with pytest.raises(Refused) as caught:
        parse(*lines)
    assert caught.value.args == (what, at)


@pytest.mark.parametrize(
    ("sent", "filename"),
    [
        ("café.png".encode("latin-1"), "café.png"),
        ("表.png".encode("shift-jis"), "\x95\\.png"),
        ("表".encode("shift-jis"), "\x95\\"),  # its last byte is a backslash
        ("кот.png".encode("koi8-r"), "koi8-r"),
        ("猫.png".encode("iso-2022-jp"), "iso-2022-jp"),
        (b"bell\x07\x7f.png", "bell\x07\x7f.png"),
        ("kočka.png".encode(), "kočka.png"),
    ],
)
def test_a_file_name_may_be_in_any_character_set(sent: bytes, filename: str) -> None:
    part = parse(b'Content-Disposition: form-data; name="image"; filename="' + sent + b'"', "Content-Type: image/png")
    assert (part.name, part.content_type) == ("image", "image/png")
    if filename.endswith((".png", "\\")):
        assert part.filename == filename
    else:
        assert part.filename == sent.decode("latin-1")


@given(st.binary(max_size=40).filter(lambda sent: not set(sent) & set(b"\0\r\n")))
def test_any_bytes_without_a_line_end_are_a_file_name(sent: bytes) -> None:
    try:
        part = parse(b'Content-Disposition: form-data; name="image"; filename="' + sent + b'"')
    except Refused:
        assert b"name" in sent.lower()  # a second field name
    else:
        assert part.name == "image"
        assert part.filename is not None


lines = st.lists(
    st.sampled_from(
        [
            b'Content-Disposition: form-data; name="a"',
            b"content-disposition:",
            b"form-data",
            b"; name=",
            b'; filename="',
            b"; filename*=utf-8''",
            b"%22",
            b"%FF",
            b"\\",
            b'"',
            b";",
            b"=",
            b"Content-Length: 1",
            b"Content-Type:",
            b"Content-Transfer-Encoding: base64",
            b":",
            b" ",
            b"\t",
            b"\r",
            b"\n",
            b"\r\n",
            b"\0",
            b"\xff",
            b"\xc4\x8d",
        ]
    )
    | st.binary(max_size=3),
    max_size=20,
).map(b"".join)


@given(lines)
def test_random_heads_raise_only_the_documented_error(data: bytes) -> None:
    head = data + b"\r\n\r\n"
    try:
        part = parse_part_head(head, refuse)
    except Refused as refusal:
        what, at = refusal.args
        assert what
        assert 0 <= at < len(head)
    else:
        assert part.name
        assert part.content_length is None or part.content_length >= 0
