"""Tests of the field grammar: values from the RFCs, values of real clients, and malformed values."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovserve.front.http1.headers import Disposition, is_token, list_members, parse_disposition, parse_options

OPTIONS = {
    "multipart/form-data; boundary=0f9a3c52-8d6d": ("multipart/form-data", {"boundary": "0f9a3c52-8d6d"}),
    "multipart/form-data;boundary=x": ("multipart/form-data", {"boundary": "x"}),
    'Multipart/Form-Data; Boundary="=_pre.amble"': ("multipart/form-data", {"boundary": "=_pre.amble"}),
    'multipart/form-data; boundary="a b:c(d)"': ("multipart/form-data", {"boundary": "a b:c(d)"}),
    "multipart/form-data; boundary=custom'boundary+1": ("multipart/form-data", {"boundary": "custom'boundary+1"}),
    "multipart/form-data; boundary=----=_Part_1.2": ("multipart/form-data", {"boundary": "----=_Part_1.2"}),
    'multipart/form-data; charset=utf-8; boundary="x=(42)?"': (
        "multipart/form-data",
        {"charset": "utf-8", "boundary": "x=(42)?"},
    ),
    "multipart/form-data; boundary=curl-own; boundary=------x": ("multipart/form-data", {"boundary": "------x"}),
    "application/json": ("application/json", {}),
    " application/json ; charset=utf-8 ;": ("application/json", {"charset": "utf-8"}),
    'text/plain; ;; a="\\"\\\\x"': ("text/plain", {"a": '"\\x'}),
    'text/plain; a=""': ("text/plain", {"a": ""}),
    # A needless escape is kept, so that a boundary or a charset with a backslash in it is refused later.
    'text/plain; a="\\x"': ("text/plain", {"a": "\\x"}),
}


@pytest.mark.parametrize("value", OPTIONS)
def test_options_of_real_clients_are_parsed(value: str) -> None:
    assert parse_options(value) == OPTIONS[value]


@pytest.mark.parametrize(
    "value",
    [
        "",
        ";",
        "multipart/",
        "/form-data",
        "multipart form-data",
        "multipart/form-data boundary=x",
        "multipart/form-data; boundary",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary =x",
        "multipart/form-data; boundary= x",
        'multipart/form-data; boundary="x',
        'multipart/form-data; boundary="x"y',
        'multipart/form-data; boundary="x\\"',
        "multipart/form-data; boundary=x y",
        "multipart/form-data; bound\x00ary=x",
        "multipart/form-data; boundary=x\r\n",
        "multipart/form-data; boundary=a, multipart/form-data; boundary=b",
    ],
)
def test_malformed_options_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="offset"):
        parse_options(value)


DISPOSITIONS = {
    'form-data; name="prompt"': ("form-data", "prompt", None),
    'form-data; name="image[]"; filename="cat.png"': ("form-data", "image[]", "cat.png"),
    'form-data; filename="cat.png"; name="image"': ("form-data", "image", "cat.png"),
    "form-data; name=image; filename=cat.png; filename*=utf-8''other.png": ("form-data", "image", "cat.png"),
    "form-data; name=image; filename*=UTF-8'cs'ko%C4%8Dka.png": ("form-data", "image", "kočka.png"),
    "form-data; name=image; filename*=iso-8859-1''%e9t%E9": ("form-data", "image", "été"),
    "form-data;name=prompt": ("form-data", "prompt", None),
    "FORM-DATA; NAME=prompt;": ("form-data", "prompt", None),
    'form-data; name="klíč"': ("form-data", "klíč", None),
    'form-data; name="lora_alphas[styles/a.safetensors]"': ("form-data", "lora_alphas[styles/a.safetensors]", None),
    'form-data; name=""; filename=""': ("form-data", "", ""),
    "form-data": ("form-data", None, None),
    # Browsers and httpx: `"` as %22; other percent signs are literal.
    'form-data; name="image"; filename="a %22q%22; semi=1%41%0D%0A.png"': (
        "form-data",
        "image",
        'a "q"; semi=1%41\r\n.png',
    ),
    # curl and urllib3: a backslash is literal, also as the last character.
    'form-data; name="image"; filename="back\\slash.png"': ("form-data", "image", "back\\slash.png"),
    'form-data; name="image"; filename="C:\\"': ("form-data", "image", "C:\\"),
    # curl --form-escape and Go.
    'form-data; name="image"; filename="a \\"q\\" back\\\\slash.png"': ("form-data", "image", 'a "q" back\\slash.png'),
    # httpx, and with it the official Python client: `"` as %22, a backslash doubled.
    'form-data; name="image"; filename="a %22q%22 back\\\\slash.png"': ("form-data", "image", 'a "q" back\\slash.png'),
    # Browsers: when a value ends in a backslash, all of its backslashes are literal.
    'form-data; name="image"; filename="a\\\\b\\"': ("form-data", "image", "a\\\\b\\"),
    'attachment; filename="cat.png"': ("attachment", None, "cat.png"),
}


@pytest.mark.parametrize("value", DISPOSITIONS)
def test_dispositions_of_real_clients_are_parsed(value: str) -> None:
    assert parse_disposition(value) == Disposition(*DISPOSITIONS[value])


@pytest.mark.parametrize(
    "value",
    [
        "",
        'form-data; name="a" name="b"',
        'form-data; name="a"; name="b"',
        'form-data; name="a',
        'form-data; name="a"b',
        'form-data, name="a"',
        'form-data; name = "a"',
        'form-data; name="a\x00b"',
        'form-data; name="a\nb"',
        "form-data; name=a; name=b; filename*=cat.png",
        'form-data; name="a"; filename="b"c"; name="d"',  # two readings of the name
        'form-data; filename="b"c"; name="a"; name="d"',
        'form-data; filename="b"c"; name="a"d"',
        'form-data; name="a; filename="b"',
    ],
)
def test_malformed_dispositions_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"offset|twice"):
        parse_disposition(value)


@pytest.mark.parametrize(
    ("parameters", "filename"),
    [
        ('filename="my "red" circle.png"', 'my "red" circle.png'),  # npm form-data 4.0.0
        ('filename="""', ""),
        ('filename="unclosed.png', "unclosed.png"),
        ("filename=two words.png", "two words.png"),
        ('filename="a"b\\c".png"', 'a"b\\c".png'),
        ('filename="a"; filename="b"', "a"),
        ("filename*=cat.png", "cat.png"),
        ("filename*=utf-8''%ff", "utf-8''%ff"),
        ("filename*=utf-8''%4", "utf-8''%4"),
        ("filename*=koi8-r''%C1", "koi8-r''%C1"),
        ("filename*=utf-8''two words.png", "utf-8''two words.png"),
        ("filename*0=a; filename*1=b", None),  # RFC 2231 section 3; no client's form needs it
    ],
)
def test_a_file_name_is_never_a_reason_to_refuse(parameters: str, filename: str | None) -> None:
    assert parse_disposition(f'form-data; name="image"; {parameters}') == ("form-data", "image", filename)
    if filename:
        assert parse_disposition(f'form-data; {parameters}; name="image"') == ("form-data", "image", filename)


visible = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\x7f"), max_size=30)


@settings(deadline=None)
@given(visible, visible)
def test_browser_encoding_round_trips(name: str, filename: str) -> None:
    # A browser does not escape backslashes, so two of them are ambiguous. They are left out here.
    name, filename = name.replace("\\", "/"), filename.replace("\\", "/")
    quoted = [text.replace('"', "%22") for text in (name, filename)]
    expected = [text.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n") for text in quoted]
    expected = [text.replace("%0d", "\r").replace("%0a", "\n") for text in expected]
    assert parse_disposition(f'form-data; name="{quoted[0]}"; filename="{quoted[1]}"') == ("form-data", *expected)


@settings(deadline=None)
@given(visible, st.booleans())
def test_quoted_strings_round_trip(text: str, padded: bool) -> None:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    space = " \t" if padded else ""
    assert parse_options(f'a/b{space};{space}x="{escaped}"{space};{space}y=1{space}') == ("a/b", {"x": text, "y": "1"})


@settings(deadline=None)
@given(st.text(max_size=60) | st.text('form-data; name="\\%2', max_size=60))
def test_random_text_raises_only_value_error(value: str) -> None:
    for parse in (parse_options, parse_disposition):
        with contextlib.suppress(ValueError):
            parse(value)


@pytest.mark.parametrize(
    "value",
    [
        "a/b" + ";" * 40_000,
        "a/b" + "; a=1" * 10_000,
        'a/b; a="' + "\\" * 40_001,
        "a" * 60_000 + "(",
        "a/b;" + " " * 60_000 + "x",
        "a/b" + " " * 60_000 + "x",
    ],
)
def test_hostile_values_take_linear_time(value: str) -> None:
    started = time.process_time()
    for parse in (parse_options, parse_disposition):
        with contextlib.suppress(ValueError):
            parse(value)
    assert time.process_time() - started < 2.0  # quadratic time would take minutes


def test_is_token_and_list_members() -> None:
    assert [is_token(text) for text in ("x-request-id", "a b", "", "é")] == [True, False, False, False]
    assert list_members("close, , keep-alive ,") == ["close", "keep-alive"]
    assert list_members("") == []
