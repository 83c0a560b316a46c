"""Our Content-Disposition parser against the `multipart` package's: every difference is listed with its reason.

Values: every part head of the captures and the corpus, values that Hypothesis builds, and an example of each known
difference.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multipart import content_disposition_unquote, header_unquote, parse_options_header

from ovserve.errors import ApiError
from ovserve.front.http1.headers import Disposition, parse_disposition
from tests.bodies import content_of

HERE = Path(__file__).parent

# Why we refuse values that the package reads, by the words of our error.
WE_REFUSE = {
    "expected a token": "the package accepts an empty kind",
    "malformed parameter": "the package skips what it cannot read, without an error",
    "is given twice": "the package keeps the last value; other parsers keep the first",
}


def unescape(raw: str, _is_filename: bool = False) -> str:
    """Undo backslash escapes, then the percent escapes of browsers: the combination that httpx writes."""
    return header_unquote(raw).replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def theirs(value: str, unquote: Callable[[str, bool], str] = unescape) -> Disposition:
    kind, options = parse_options_header(value, unquote=unquote)
    return Disposition(kind, options.get("name"), options.get("filename"))


def values() -> dict[str, set[str]]:
    """Return every Content-Disposition value of the captures and the corpus, with the files it occurs in."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted([*HERE.rglob("*.http"), *HERE.rglob("*.body")]):
        content = path.read_bytes()
        if path.suffix == ".http":
            with contextlib.suppress(ApiError, AssertionError):  # the framing itself may be malformed
                content = content_of(content)
        for match in re.finditer(rb"(?im)^content-disposition:([^\r\n]*)", content):
            with contextlib.suppress(UnicodeDecodeError):  # refused before the value is parsed
                found[match[1].decode().strip(" \t")].add(path.name)
    return found


VALUES = values()


def test_captures_and_corpus_differ_only_where_we_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    refused: Counter[str] = Counter()
    for value in VALUES:
        try:
            ours = parse_disposition(value)
        except ValueError as error:
            (words,) = (words for words in WE_REFUSE if words in str(error))
            refused[words] += 1
        else:
            assert ours == theirs(value), value
    with capsys.disabled():
        print(f"\n{len(VALUES)} Content-Disposition values, {len(VALUES) - refused.total()} read alike; refused:")
        for words, count in refused.most_common():
            print(f"  {count:4} {words}: {WE_REFUSE[words]}")
    assert set(refused) == set(WE_REFUSE)
    assert len(VALUES) - refused.total() > 100


def test_content_disposition_unquote_misreads_two_clients() -> None:
    """Compare with the package's own function.

    httpx doubles a backslash and writes `"` as %22. The package undoes one of the two ways of escaping, not both.
    """
    different = set()
    for value, files in VALUES.items():
        with contextlib.suppress(ValueError):
            if parse_disposition(value) != theirs(value, content_disposition_unquote):
                different |= {re.sub(r"-\d.*__", " ", file) for file in files}
    assert different == {"httpx httpx_filename_specials.http", "openai-python edit_filename_specials.http"}


# (value, what we read or None when we refuse, what the package reads)
DIFFERENCES = {
    "an unquoted value is cut at the first character that is not a token character": (
        "form-data; name=image[]",
        ("form-data", "image[]", None),
        ("form-data", "image", None),
    ),
    "a parameter after a tab is skipped": (
        'form-data;\tname="a"',
        ("form-data", "a", None),
        ("form-data", None, None),
    ),
    "a parameter is found inside the value of one that was skipped": (
        'form-data; name="a"; x!="; name=b"',
        ("form-data", "a", None),
        ("form-data", "b", None),
    ),
    "a browser's backslash before the closing quotation mark hides the parameter": (
        'form-data; name="a"; filename="C:\\"',
        ("form-data", "a", "C:\\"),
        ("form-data", "a", None),
    ),
    "filename* is not read": (
        "form-data; name=a; filename*=utf-8''b",
        ("form-data", "a", "b"),
        ("form-data", "a", None),
    ),
    "the escapes of CR and LF are read in capitals only": (
        'form-data; name="a%0d%0A"',
        ("form-data", "a\r\n", None),
        ("form-data", "a%0d\n", None),
    ),
    "blanks around the equals sign are skipped": (
        'form-data; name = "a"',
        None,
        ("form-data", "a", None),
    ),
    "control characters are accepted": (
        'form-data; name="a\x00"',
        None,
        ("form-data", "a\x00", None),
    ),
    "the kind is not checked": (
        'form data/x; name="a"',
        None,
        ("form data/x", "a", None),
    ),
}


@pytest.mark.parametrize("why", DIFFERENCES)
def test_each_known_difference_exists(why: str) -> None:
    value, ours, other = DIFFERENCES[why]
    if ours is None:
        with pytest.raises(ValueError, match="offset"):
            parse_disposition(value)
    else:
        assert parse_disposition(value) == ours
    assert theirs(value) == other


texts = st.text(
    st.sampled_from('ab[]=;,"\\%2D/ \té\u2603') | st.characters(exclude_categories=["Cs", "Cc"]), max_size=20
).filter(lambda text: not re.search("%0[AaDd]|%22|\x7f", text))


def backslashes(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def httpx(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', "%22")


def browser(text: str) -> str:
    return text.replace('"', "%22")


@given(texts, texts, st.sampled_from([backslashes, httpx]), st.sampled_from(["; ", ";", " ;  "]), st.booleans())
def test_quoted_values_are_read_alike(
    name: str, filename: str, escape: Callable[[str], str], separator: str, swapped: bool
) -> None:
    parameters = [f'name="{escape(name)}"', f'FILENAME="{escape(filename)}"', "size=1"]
    value = separator.join(["Form-Data", *(reversed(parameters) if swapped else parameters)])
    assert parse_disposition(value) == theirs(value) == ("form-data", name, filename)


@given(texts)
def test_a_browser_s_value_is_read_alike_unless_it_ends_in_a_backslash(text: str) -> None:
    value = f'form-data; name="{browser(text.rstrip(chr(92)))}"'
    assert parse_disposition(value) == theirs(value)


tokens = st.text("ab!#$&'*+-.^_`|~09", min_size=1, max_size=10)


@given(tokens, st.none() | tokens, st.sampled_from(["; ", ";", " ;  "]))
def test_tokens_are_read_alike(name: str, filename: str | None, separator: str) -> None:
    value = f"form-data{separator}name={name}" + (f"{separator}filename={filename}" if filename else "")
    assert parse_disposition(value) == theirs(value) == ("form-data", name, filename)
