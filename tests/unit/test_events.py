"""Server-sent events: whole lines, always followed by a blank line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovserve.front.http1.events import comment, encode_event, event


def test_event_has_its_kind_and_its_data() -> None:
    assert event("image_edit.completed", b'{"a":1}') == b'event: image_edit.completed\ndata: {"a":1}\n\n'


def test_comment_ends_with_a_blank_line() -> None:
    assert comment(b"step 3/20") == b": step 3/20\n\n"
    assert comment(b"a\r\nb") == b": a\n: b\n\n"


def test_event_without_a_kind_is_a_comment() -> None:
    assert encode_event("", [b"waiting"]) == [comment(b"waiting")]
    assert encode_event("error", [b"{}"]) == [event("error", b"{}")]


@pytest.mark.parametrize("kind", ["", "x"])
def test_data_in_several_chunks_is_encoded_like_one_line(kind: str) -> None:
    assert b"".join(encode_event(kind, [b'{"a":', b"1", b"}"])) == b"".join(encode_event(kind, [b'{"a":1}']))


@pytest.mark.parametrize("end", [b"\n", b"\r"])
def test_line_end_in_one_of_several_chunks_is_rejected(end: bytes) -> None:
    with pytest.raises(ValueError, match="one line"):
        encode_event("x", [b"a", b"b" + end])


def test_kind_of_two_lines_is_rejected() -> None:
    for kind in ("a\nb", "a\rb"):
        with pytest.raises(ValueError, match="one line"):
            event(kind, b"")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_data_cannot_end_an_event_early(text: str) -> None:
    block = event("x", text.encode())
    assert block.endswith(b"\n\n")
    lines = block.removesuffix(b"\n\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    assert lines[0] == b"event: x"
    assert all(line.startswith(b"data: ") for line in lines[1:])
