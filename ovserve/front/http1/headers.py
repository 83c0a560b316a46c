"""RFC 9110 field grammar: token, quoted-string, parameters, Content-Type, Content-Disposition.

Where the RFCs and the bytes of real clients differ, the clients win as long as no two readings are possible:

- an unquoted parameter value may hold what a boundary may (`=`, `:`, `/`, ...), not only token characters: JavaMail and others
  do not quote them;
- in Content-Disposition, browsers write `"` as `%22`, CR and LF as `%0D` and `%0A`, and a backslash as itself (WHATWG HTML,
  multipart/form-data encoding), curl --form-escape and Go write backslash escapes (RFC 9110 section 5.6.4). A quoted string is
  read by the RFC's grammar first, then by the browsers'.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

__all__ = ["TOKEN", "Disposition", "is_token", "list_members", "parse_disposition", "parse_options"]

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110 section 5.6.2, no secret

# An unquoted value: visible, and nothing that ends or nests a parameter. Includes every `bcharsnospace` of RFC 2046.
_LOOSE_VALUE = r'[^\x00-\x20\x7f";\\]+'
_RFC_QUOTED = r'"((?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*)"'
_BROWSER_QUOTED = r'"([^"\x00-\x08\x0a-\x1f\x7f]*)"'


def _parameter(quoted: str) -> re.Pattern[str]:
    """RFC 9110 section 5.6.6: parameters = *( OWS ";" OWS [ parameter ] ), and a parameter ends where the next begins."""
    return re.compile(rf"[ \t]*+;[ \t]*+(?:({TOKEN})=(?:{quoted}|({_LOOSE_VALUE})))?(?=[ \t]*+(?:;|\Z))")


_rfc_parameter = _parameter(_RFC_QUOTED)
_browser_parameter = _parameter(_BROWSER_QUOTED)
_main_value = re.compile(rf"[ \t]*+({TOKEN}(?:/{TOKEN})?)[ \t]*+(?=;|\Z)")
_token = re.compile(TOKEN)
_escape = re.compile(r"\\(.)")
_browser_escape = re.compile(r'\\(["\\])|%(22|0[AaDd])')
_BROWSER_ESCAPES = {"22": '"', "0A": "\n", "0D": "\r"}
_extended_value = re.compile(r"(?i:(utf-8|iso-8859-1))'[^']*'((?:[!#$&+\-.^_`|~0-9A-Za-z]|%[0-9A-Fa-f]{2})*)")

# What nearly every client sends for a part, free of escapes: read by one match.
_plain_disposition = re.compile(r'form-data; name="([^"\\%\x00-\x1f\x7f]*)"(?:; filename="([^"\\%\x00-\x1f\x7f]*)")?')


class Disposition(NamedTuple):
    """A Content-Disposition field: the kind in lower case, and its two parameters as the client meant them."""

    kind: str
    name: str | None
    filename: str | None


def is_token(text: str) -> bool:
    """Whether the text is a token of RFC 9110 section 5.6.2."""
    return _token.fullmatch(text) is not None


def list_members(value: str) -> list[str]:
    """The members of a comma-separated list without empty ones (RFC 9110 section 5.6.1), for lists that hold tokens only."""
    return [member for part in value.split(",") if (member := part.strip(" \t"))]


def parse_options(value: str) -> tuple[str, dict[str, str]]:
    """Read `type/subtype; name=value; name="value"` as in Content-Type: the value in lower case, parameters by lower-case name.

    Of two parameters with one name the last wins: `curl -F` with a Content-Type of the user's own sends two boundaries, and the
    second is the true one.

    Raises:
        ValueError: the text does not follow the grammar; the message says where.
    """
    main, pairs = _scan(value, _rfc_parameter)
    return main, {name: _escape.sub(r"\1", quoted) if quoted else loose for name, quoted, loose in pairs}


def parse_disposition(value: str) -> Disposition:
    """Read a Content-Disposition field (RFC 6266 section 4.1, RFC 7578 section 4.2), with either way of escaping.

    `filename*` (RFC 8187) counts only where there is no `filename`: RFC 7578 forbids it in forms, and .NET sends both.

    Raises:
        ValueError: the text does not follow the grammar, or names one parameter twice; the message says where.
    """
    if plain := _plain_disposition.fullmatch(value):
        return Disposition("form-data", plain[1], plain[2])
    try:
        kind, pairs = _scan(value, _rfc_parameter)
    except ValueError:
        kind, pairs = _scan(value, _browser_parameter)
    options: dict[str, str] = {}
    for name, quoted, loose in pairs:
        if name in options:
            raise ValueError(f"parameter {name!r} is given twice")
        options[name] = _browser_escape.sub(_undo_escape, quoted or loose)
    filename = options.get("filename")
    if filename is None and "filename*" in options:
        filename = _decode_extended(options["filename*"])
    return Disposition(kind, options.get("name"), filename)


def _scan(value: str, parameter: re.Pattern[str]) -> tuple[str, list[tuple[str, str, str]]]:
    """The main value, and (name, quoted value, unquoted value) of each parameter. Raises ValueError."""
    main = _main_value.match(value)
    if not main:
        raise ValueError("expected a token at offset 0")
    pairs: list[tuple[str, str, str]] = []
    position, end = main.end(), len(value.rstrip(" \t"))
    while position < end:
        match = parameter.match(value, position)
        if not match:
            raise ValueError(f"malformed parameter at offset {position}")
        if match[1]:
            pairs.append((match[1].lower(), match[2] or "", match[3] or ""))
        position = match.end()
    return main[1].lower(), pairs


def _undo_escape(match: re.Match[str]) -> str:
    return match[1] or _BROWSER_ESCAPES[match[2].upper()]


def _decode_extended(value: str) -> str:
    match = _extended_value.fullmatch(value)
    if not match:
        raise ValueError("malformed filename*")
    try:
        return unquote_to_bytes(match[2]).decode(match[1])
    except UnicodeDecodeError:
        raise ValueError("filename* is not in the character set it names") from None
