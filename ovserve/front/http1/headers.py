"""RFC 9110 field grammar: token, quoted-string, parameters, Content-Type, Content-Disposition.

Clients deviate from the RFCs. What they send is accepted as long as only one reading is possible:

- An unquoted parameter value may hold every character of a boundary (`=`, `:`, `/`, ...), not only token characters,
  because some clients do not quote such boundaries.
- In Content-Disposition, browsers write `"` as `%22`, CR and LF as `%0D` and `%0A`, and a backslash as itself (WHATWG
  HTML, multipart/form-data encoding). curl --form-escape and Go write backslash escapes (RFC 9110 section 5.6.4).
  httpx, and with it the official Python client, writes `"` as `%22` but a backslash as two. A value is read by the
  RFC's grammar first, then by the browsers'.
- A file name is never used, so it is never a reason to refuse a form: quotes inside it (npm form-data 4.0.0 escapes
  none), a `filename*` that cannot be decoded, and a second file name are accepted. The name of a field stays strict.

The grammar, the check for repeated parameters and `filename*` are implemented here. The `multipart` package undoes the
backslash escapes. Its `parse_options_header` is not used: it skips what it cannot read, keeps the last of two
parameters with one name, cuts an unquoted value at the first character that is not a token character, and its grammar
differs between releases.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from multipart import header_unquote

__all__ = ["TOKEN", "Disposition", "is_token", "list_members", "parse_disposition", "parse_options"]

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110 section 5.6.2, not a password

_QUOTED_VALUE = r'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*"'
# Visible characters, except those that end or nest a parameter. Includes every `bcharsnospace` of RFC 2046.
_UNQUOTED_VALUE = r'[^\x00-\x20\x7f";\\]+'
# RFC 9110 section 5.6.6: parameters = *( OWS ";" OWS [ parameter ] ). A parameter must end where the next one begins.
_parameter = re.compile(rf"[ \t]*+;[ \t]*+(?:({TOKEN})=({_QUOTED_VALUE}|{_UNQUOTED_VALUE}))?(?=[ \t]*+(?:;|\Z))")
_main_value = re.compile(rf"[ \t]*+({TOKEN}(?:/{TOKEN})?)[ \t]*+(?=;|\Z)")
_token = re.compile(TOKEN)
# The characters that browsers escape, in either case. None of the replacements can form a new escape.
_PERCENT_ESCAPES = {"%22": '"', "%0D": "\r", "%0d": "\r", "%0A": "\n", "%0a": "\n"}
_FILENAMES = ("filename", "filename*")
# No blanks before the semicolon: a search that begins at each of many blanks takes quadratic time.
_filename_begin = re.compile(r";[ \t]*+(filename\*?)=", re.IGNORECASE)
_name_begin = re.compile(r";[ \t]*+name[ \t]*+=", re.IGNORECASE)
_extended_value = re.compile(r"(?i:(utf-8|iso-8859-1))'[^']*'((?:[!#$&+\-.^_`|~0-9A-Za-z]|%[0-9A-Fa-f]{2})*)")


class Disposition(NamedTuple):
    """A Content-Disposition field: the kind in lower case, and its two parameters without quotes and escapes."""

    kind: str
    name: str | None
    filename: str | None


def is_token(text: str) -> bool:
    """Return whether the text is a token of RFC 9110 section 5.6.2."""
    return _token.fullmatch(text) is not None


def list_members(value: str) -> list[str]:
    """Return the non-empty members of a comma-separated list (RFC 9110 section 5.6.1). Only for lists of tokens."""
    return [member for part in value.split(",") if (member := part.strip(" \t"))]


def parse_options(value: str) -> tuple[str, dict[str, str]]:
    """Parse `type/subtype; name=value; name="value"` as in Content-Type.

    The last of two parameters with one name wins: `curl -F` with a Content-Type set by the user sends two boundaries,
    and the second one is the boundary of the body.

    A backslash escapes only `"` and another backslash. It stays in front of any other character, where RFC 9110 section
    5.6.4 drops it: no client needs such an escape, and a boundary or charset with a backslash in it is then refused.

    Returns:
        The main value in lower case, and the parameters by lower-case name.

    Raises:
        ValueError: the text does not follow the grammar; the message has the offset.
    """
    main, pairs = _split(value)
    return main, {name: header_unquote(raw) for name, raw in pairs}


def parse_disposition(value: str) -> Disposition:
    """Parse a Content-Disposition field (RFC 6266 section 4.1, RFC 7578 section 4.2) with any of the ways of escaping.

    `filename*` (RFC 8187) counts only where there is no `filename`: RFC 7578 forbids it in forms, and .NET sends both.
    The first of two file names counts. One that follows no grammar is returned as sent, without its outer quotes.

    Raises:
        ValueError: the text outside the file name does not follow the grammar (the message has the offset), or another
            parameter is given twice.
    """
    kind, pairs = _split_disposition(value)
    options: dict[str, str] = {}
    for name, raw in pairs:
        if name in options:
            if name in _FILENAMES:
                continue
            raise ValueError(f"parameter {name!r} is given twice")
        options[name] = header_unquote(raw)
        for escape, character in _PERCENT_ESCAPES.items():
            options[name] = options[name].replace(escape, character)
    filename = options.get("filename")
    if filename is None and "filename*" in options:
        filename = _decode_extended(options["filename*"])
    return Disposition(kind, options.get("name"), filename)


def _split_disposition(value: str) -> tuple[str, list[tuple[str, str]]]:
    """Return what `_split` returns, for a Content-Disposition field. Raises ValueError."""
    try:
        return _split(value)
    except ValueError as error:
        # A browser leaves a backslash at the end of a value as it is. The RFC's grammar reads it when it is doubled.
        for split, text in ((_split, value.replace("\\", "\\\\")), (_split_around_filename, value)):
            try:
                return split(text)
            except ValueError:
                continue
        raise error from None


def _split_around_filename(value: str) -> tuple[str, list[tuple[str, str]]]:
    """Return what `_split` returns, for a value whose file name has quotes inside it.

    Such a file name ends where a parameter `name` begins, else at the end of the value. It is returned in a form that
    `header_unquote` leaves unchanged.

    Raises:
        ValueError: the rest does not follow the grammar, or `name` occurs both before and in the file name, so that two
            readings are possible.
    """
    begin = _filename_begin.search(value)
    if not begin:
        raise ValueError("no file name")
    kind, pairs = _split(value[: begin.start()])
    names = [match.start() for match in _name_begin.finditer(value, begin.end())]
    if len(names) + sum(name == "name" for name, _ in pairs) > 1:
        raise ValueError("parameter 'name' is given twice")
    end = names[0] if names else len(value)
    filename = value[begin.end() : end].strip(' \t"').replace("\\", "\\\\").replace('"', '\\"')
    return kind, [*pairs, (begin[1].lower(), f'"{filename}"'), *_split(f"{kind}{value[end:]}")[1]]


def _split(value: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the main value, and the name and the raw value (quoted or not) of each parameter. Raises ValueError."""
    main = _main_value.match(value)
    if not main:
        raise ValueError("expected a token at offset 0")
    pairs: list[tuple[str, str]] = []
    position, end = main.end(), len(value.rstrip(" \t"))
    while position < end:
        match = _parameter.match(value, position)
        if not match:
            raise ValueError(f"malformed parameter at offset {position}")
        if match[1]:
            pairs.append((match[1].lower(), match[2]))
        position = match.end()
    return main[1].lower(), pairs


def _decode_extended(value: str) -> str:
    """Decode the value of `filename*` (RFC 8187 section 3.2); return it unchanged if that is impossible."""
    match = _extended_value.fullmatch(value)
    if not match:
        return value
    try:
        return unquote_to_bytes(match[2]).decode(match[1])
    except UnicodeDecodeError:
        return value
