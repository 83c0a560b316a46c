"""Our parser against the one of the `multipart` package: every difference is listed with its reason.

Bodies: the captures, the malformed corpus, forms that Hypothesis builds, and bodies that are almost forms. The package
gets each body whole, because its result for a preamble depends on how the body is split.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import multipart
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ovserve.front.http1.headers import parse_options
from tests.bodies import Part, build, content_of, outcome, pieces_of
from tests.strategies import almost_forms, boundaries, parts

HERE = Path(__file__).parent
HEAD_BYTES = 300  # limit of a part head that the bodies of these tests can reach

# Why we refuse bodies that the package accepts, by the words of our error.
WE_REFUSE = {
    "1 to 70 characters": "RFC 2046 section 5.1.1 limits a boundary's length and characters; the package accepts any",
    "folded field line": "obsolete folding is read in three ways by servers; no captured client folds",
    "control character": "RFC 9110 section 5.5 allows none in a field; the package accepts NUL and bare CR",
    "field name is not a token": "a blank before the colon (RFC 9112 section 5.1); the package strips it",
    "twice": "two parsers read a repeated Content-Disposition, Content-Type or parameter differently",
    "without a name": "RFC 7578 section 4.2 requires a name; the package returns an empty one unless strict",
    "malformed parameter": "the package skips what it cannot read in a Content-Disposition",
    "a delimiter before the blank line": "some parsers read two parts; the package reads a field line",
    "a delimiter directly follows the head": "an empty part in RFC 2046, content for the package",
    "followed by more than blanks": "RFC 2046 allows only blanks and a line end there; the package does not check",
    "the body ends inside the line of the close delimiter": "the same rule, with half a line end",
    "the head is longer than": "our limit is for a whole head, the package's for one line",
}  # fmt: skip

# Why we accept bodies that the package refuses, by the words of its error.
THEY_REFUSE = {
    "Unexpected byte after first boundary": "transport padding (RFC 2046 section 5.1.1), which a capture has",
    "Unexpected bytes after boundary": "transport padding after a later delimiter",
    "Unexpected byte in front of first boundary": "inside a preamble line, the boundary belongs to the preamble",
    "Invalid segment header name": "any token is a field name (RFC 9110 section 5.1), and unknown fields are ignored",
    "Invalid segment Content-Length": "leading zeros are allowed (RFC 9110 section 8.6)",
    "Maximum segment header count": "the package accepts eight fields in a head; our limit is in bytes",
}  # fmt: skip


FILENAME_STAR = "only we read filename*"


def theirs(body: bytes, boundary: str) -> list[Part] | str:
    found: list[Part] = []
    data = b""
    try:
        with multipart.PushMultipartParser(boundary, max_header_size=HEAD_BYTES) as parser:
            for event in parser.parse(body):
                if isinstance(event, multipart.MultipartSegment):
                    kind = event.header("Content-Type")
                    coding = event.header("Content-Transfer-Encoding", "binary")
                    found.append(Part(event.name, b"", event.filename, kind, coding.strip().lower()))
                    data = b""
                elif event is None:
                    found[-1] = replace(found[-1], data=data)
                else:
                    data += event
    except multipart.MultipartError as error:
        return str(error)
    return found


def normal(part: Part) -> Part:
    """Return a part without the known differences in names.

    The package cuts Windows paths, reads %0D and %0A in capitals only, and undoes only one of two ways of escaping.
    """
    name = unescaped(part.name).replace("\\", "")
    filename = None if part.filename is None else unescaped(part.filename).rpartition("\\")[-1]
    return replace(part, name=name, filename=filename, content_type=(part.content_type or "").strip(" \t") or None)


def unescaped(name: str) -> str:
    for escape, meant in (("%22", '"'), ("%0[Dd]", "\r"), ("%0[Aa]", "\n")):
        name = re.sub(escape, meant, name)
    return name


def reason(pieces: list[bytes], boundary: str) -> str:
    """Return `same`, `both refuse`, or the listed reason of a difference. Fails when the difference is not listed."""
    ours = outcome(pieces, boundary, max_parts=1000, max_part_head_bytes=HEAD_BYTES)
    their = theirs(b"".join(pieces), boundary)
    if isinstance(ours, tuple):
        if isinstance(their, str):
            return "both refuse"
        words = [words for words in WE_REFUSE if words in ours[1]]
        assert words, f"we refuse with {ours[1]!r}, but the package returns {their}"
        return f"we: {words[0]}"
    if isinstance(their, str):
        words = [words for words in THEY_REFUSE if words in their]
        assert words, f"the package refuses with {their!r}, but we return {ours}"
        return f"they: {words[0]}"
    mine, others = [normal(part) for part in ours], [normal(part) for part in their]
    if mine != others and b"filename*" in b"".join(pieces):
        # RFC 7578 forbids filename* in forms, but .NET sends it. The package does not read it.
        others = [
            replace(other, filename=other.filename or one.filename) for one, other in zip(mine, others, strict=True)
        ]
        assert mine == others
        return FILENAME_STAR
    assert mine == others
    return "same"


def corpus() -> Iterator[tuple[str, str, bytes]]:
    for capture in json.loads((HERE / "captures/index.json").read_text("utf-8"))["captures"]:
        if "boundary" in capture:
            raw = (HERE / "captures" / capture["file"]).read_bytes()
            yield capture["file"], capture["boundary"], content_of(raw)
    for path in sorted((HERE / "corpus/forms").glob("*.body")):
        content_type = json.loads(path.with_suffix(".json").read_text("utf-8"))["content_type"]
        try:
            main, parameters = parse_options(content_type or "")
        except ValueError:
            continue
        if main == "multipart/form-data" and parameters.get("boundary"):
            yield path.name, parameters["boundary"], path.read_bytes()


HEAD = b'Content-Disposition: form-data; name="a"'
# Bodies for differences that neither the captures nor the corpus show.
FURTHER = {
    "a token as field name": ("B0", b"--B0\r\n" + HEAD + b"\r\nX!: 1\r\n\r\nx\r\n--B0--"),
    "leading zeros": ("B0", b"--B0\r\n" + HEAD + b"\r\nContent-Length: 01\r\n\r\nx\r\n--B0--"),
    "nine fields": ("B0", b"--B0\r\n" + HEAD + b"\r\nX: 1" * 8 + b"\r\n\r\nx\r\n--B0--"),
    "a long head of short lines": ("B0", b"--B0\r\n" + HEAD + b"\r\nX: %b" % (b"x" * 99) * 3 + b"\r\n\r\nx\r\n--B0--"),
    "padding": ("B0", b"--B0\r\n" + HEAD + b"\r\n\r\nx\r\n--B0 \r\n" + HEAD + b"\r\n\r\nx\r\n--B0--"),
    "the boundary in a preamble line": ("B0", b"x--B0y\r\n--B0\r\n" + HEAD + b"\r\n\r\nx\r\n--B0--"),
    "filename* alone": ("B0", b"--B0\r\n" + HEAD + b"; filename*=utf-8''b\r\n\r\nx\r\n--B0--"),
    "a long boundary": ("B" * 71, build([Part("a", b"x")], "B" * 71)),
}


def test_differences_on_captures_and_corpus_are_those_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: Counter[str] = Counter()
    bodies = [*corpus(), *((name, *further) for name, further in FURTHER.items())]
    for _, boundary, body in bodies:
        for sizes in ([], [7] * len(body)):
            found[reason(list(pieces_of(body, sizes)), boundary)] += 1
    with capsys.disabled():
        print(f"\n{len(bodies)} bodies, whole and in pieces of 7:")
        for outcome_, count in found.most_common():
            side, _, words = outcome_.partition(": ")
            why = {"we": WE_REFUSE, "they": THEY_REFUSE}.get(side, {}).get(words, "")
            print(f"  {count:4} {outcome_}  {why}")
    listed = {f"we: {words}" for words in WE_REFUSE} | {f"they: {words}" for words in THEY_REFUSE} | {FILENAME_STAR}
    assert listed <= set(found), f"listed but never seen: {sorted(listed - set(found))}"


@st.composite
def forms(draw: st.DrawFn) -> tuple[str, bytes]:
    boundary = draw(boundaries)
    return boundary, build(draw(parts(boundary)), boundary)


@budget(suppress_health_check=[HealthCheck.too_slow])
@given(forms(), st.integers(1, 100))
def test_built_forms_are_parsed_alike(form: tuple[str, bytes], size: int) -> None:
    boundary, body = form
    assert reason(list(pieces_of(body, [size] * len(body))), boundary) == "same"


@given(almost_forms, st.integers(1, 100))
def test_almost_forms_differ_only_in_listed_ways(body: bytes, size: int) -> None:
    assert reason(list(pieces_of(body, [size] * len(body))), "B0")
