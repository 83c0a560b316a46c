"""Properties of the multipart parser for any input: splits, round trips, limits, held bytes, documented errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ovserve.errors import MalformedRequest, TooManyParts
from ovserve.front.forms.multipart import MultipartParser
from tests.bodies import Part, build, outcome, parse, parts_of, pieces_of
from tests.strategies import almost_forms, boundaries, cuts, parts

HEAD = b'Content-Disposition: form-data; name="a"\r\n\r\n'
WHOLE = b"--B0\r\n" + HEAD + b"x\r\n--B0--\r\n"


@st.composite
def forms(draw: st.DrawFn) -> tuple[str, list[Part], bytes]:
    boundary = draw(boundaries)
    wanted = draw(parts(boundary))
    preamble = draw(st.sampled_from([b"", b"ignore me", b"\r\n", b"--", b"\r\n\r\n--"]))
    epilogue = draw(
        st.sampled_from([b"", b"\r\n", b"  \t\r\n", b"\r\nanything", b"\r\n--" + boundary.encode() + b"\r\n"])
    )
    return boundary, wanted, build(wanted, boundary, preamble=preamble, epilogue=epilogue)


@given(forms(), cuts)
def test_a_built_form_parses_to_its_parts(form: tuple[str, list[Part], bytes], sizes: list[int]) -> None:
    boundary, wanted, body = form
    assert parts_of(parse(pieces_of(body, sizes), boundary), body) == wanted


@given(almost_forms, cuts)
@example(b"--B0\r\n\r\nx\r\n--B0--\r\n", [1] * 30)
@example(b"--B0\r\n" + HEAD + b"--B0", [1] * 80)
@example(b"--B0\r\n" + HEAD + b"\r\n--B0 \r\n" + HEAD + b"\r\n--B0--", [1] * 200)
def test_any_split_gives_the_same_parts_or_the_same_error(body: bytes, sizes: list[int]) -> None:
    limits = {"max_parts": 3, "max_part_head_bytes": 128}
    whole = outcome([body], "B0", **limits)
    assert outcome(list(pieces_of(body, sizes)), "B0", **limits) == whole
    assert outcome(list(pieces_of(body, [1] * len(body))), "B0", **limits) == whole


@given(st.binary(max_size=400) | almost_forms, boundaries, cuts)
def test_random_bytes_raise_only_documented_errors(body: bytes, boundary: str, sizes: list[int]) -> None:
    parser = MultipartParser(boundary, max_parts=4, max_part_head_bytes=128)
    try:
        for piece in pieces_of(body, sizes):
            parser.feed(piece)
        parser.finish()
    except (MalformedRequest, TooManyParts) as error:
        assert "byte " in error.message
        assert error.status == 400


@given(almost_forms, cuts)
def test_held_bytes_are_bounded(body: bytes, sizes: list[int]) -> None:
    parser = MultipartParser("B0", max_parts=8, max_part_head_bytes=128)
    fed = 0
    for piece in pieces_of(body, sizes):
        try:
            parser.feed(piece)
        except (MalformedRequest, TooManyParts):
            return
        fed += len(piece)
        assert parser.held_bytes <= 128
        assert parser.offset == fed


@given(st.integers(1, 6), cuts)
def test_parts_are_accepted_up_to_their_limit(limit: int, sizes: list[int]) -> None:
    def body(count: int) -> bytes:
        return build([Part("a", b"x")] * count, "B0")

    assert len(parts_of(parse(pieces_of(body(limit), sizes), "B0", max_parts=limit), body(limit))) == limit
    with pytest.raises(TooManyParts, match=f"more than {limit} parts"):
        parse(pieces_of(body(limit + 1), sizes), "B0", max_parts=limit)


@given(st.integers(len(HEAD), 400), cuts, st.booleans())
def test_a_head_is_accepted_up_to_its_limit(limit: int, sizes: list[int], usual: bool) -> None:
    def body(size: int) -> bytes:
        head = HEAD if usual else HEAD.replace(b"C", b"c")
        name = b"a" * (size - len(head) + 1)
        return WHOLE.replace(HEAD, head.replace(b'"a"', b'"' + name + b'"'))

    options: dict[str, Any] = {"max_part_head_bytes": limit}
    assert len(parse(pieces_of(body(limit), sizes), "B0", **options)) == 3
    with pytest.raises(MalformedRequest, match=f"longer than {limit} bytes"):
        parse(pieces_of(body(limit + 1), sizes), "B0", **options)


@given(st.text(st.characters(max_codepoint=0x17F), min_size=1, max_size=80))
def test_boundaries_are_accepted_or_refused_by_the_grammar(boundary: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'()+_,-./:=? ")
    fits = len(boundary) <= 70 and set(boundary) <= allowed and not boundary.endswith(" ")
    if fits:
        assert outcome([build([], boundary)], boundary) == []
    else:
        with pytest.raises(MalformedRequest, match="boundary"):
            MultipartParser(boundary, max_parts=1, max_part_head_bytes=128)
