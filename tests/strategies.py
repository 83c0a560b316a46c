"""Hypothesis strategies: boundaries, parts, malformed bodies, and splits of bytes into pieces."""

from __future__ import annotations

import string

from hypothesis import strategies as st

from tests.bodies import Part

__all__ = ["almost_forms", "boundaries", "cuts", "parts"]

_INNER = string.ascii_letters + string.digits + "'()+_,-./:=? "
boundaries = st.builds(
    lambda inner, last: inner + last, st.text(_INNER, max_size=69), st.sampled_from(_INNER.replace(" ", ""))
)

# Every character that a name can contain; characters with a meaning in the syntax occur often.
# No backslash: clients disagree about whether it escapes the next character.
_names = st.text(
    st.one_of(
        st.sampled_from("ab[]=;,'\"%20/ \t"),
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\%"),
    ),
    min_size=1,
    max_size=20,
).filter(lambda name: not any(escape in name.upper() for escape in ("%22", "%0A", "%0D")))


def _content(boundary: str) -> st.SearchStrategy[bytes]:
    """Return a strategy for content: bytes that resemble a delimiter, but no delimiter at the start of a line."""
    pieces = st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"-", b"--", boundary.encode()[:-1], boundary.encode(), b"\r\n--", b"x"]
    )
    line = b"\r\n--" + boundary.encode()
    return (
        st.lists(pieces | st.binary(max_size=8), max_size=12)
        .map(b"".join)
        .filter(lambda data: line not in b"\r\n" + data + b"\r\n" and not (b"\r\n" + data).endswith(line))
    )


def parts(boundary: str, max_size: int = 6) -> st.SearchStrategy[list[Part]]:
    """Return a strategy for lists of parts that a form with this boundary can contain."""
    part = st.builds(
        Part,
        _names,
        _content(boundary),
        st.none() | _names,
        st.sampled_from([None, None, "image/png", "text/plain; charset=utf-8", "application/octet-stream"]),
    )
    return st.lists(part, max_size=max_size)


_LINES = [
    b"--B0\r\n",
    b"\r\n--B0\r\n",
    b"\r\n--B0--\r\n",
    b"\r\n--B0--",
    b'Content-Disposition: form-data; name="a"\r\n',
    b'content-disposition:form-data;name=a; filename="b"\r\n',
    b"Content-Type: text/plain\r\n",
    b"Content-Length: 3\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"abc",
    b"\r",
    b"\n",
    b"-",
    b"--B",
    b" ",
    b"\t",
    b"\0",
    b"\xff",
    b":",
]
# Bodies for the boundary B0; most of them are malformed.
almost_forms = st.lists(st.sampled_from(_LINES) | st.binary(max_size=3), max_size=30).map(b"".join)

cuts = st.lists(st.integers(1, 40), max_size=60)
