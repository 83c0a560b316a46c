"""Parsing of one field's value: form text or a JSON value to a value within the field's bounds.

Numbers in a form are accepted as the `str()` of client languages writes them, without blanks, plus signs or leading
zeros; JSON values must have the right type. Every error message begins with the field's name as the client wrote it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ovserve.api.parameters.fields import Field
from ovserve.errors import InvalidType, InvalidValue
from ovserve.settings.options import Resolution

__all__ = ["check_range", "expected", "parse_value", "parse_weights", "shown"]

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,39})")
_NUMBER = re.compile(r"-?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,4})?")
_TIMES = re.compile("[X*\u00d7]")  # written for the x of a size
_KEY = re.compile(r"[^\[\]]+\[([^\[\]]+)\]")  # of an object: `x[KEY]`
_MAX_DIGITS = 40  # of an integer, in a form and in JSON
_MAX_SHOWN_CHARS = 100  # of a value in a message
_EXPECTED = {
    "text": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "choice": "a string",
    "size": "a string",
    "file": "a file",
    "files": "a file",
    "object": "an object",
}
_TRUE, _FALSE = frozenset(("true", "1")), frozenset(("false", "0"))


def expected(known: Field) -> str:
    """Return the type that a field accepts, in words."""
    return _EXPECTED[known.kind]


def shown(value: Any) -> str:
    """Return a value for a message: at most 100 characters, on one line, lists and objects without contents."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            text = repr(value[:_MAX_SHOWN_CHARS])  # escapes what is not printable, halves of surrogate pairs included
            return text if len(value) <= _MAX_SHOWN_CHARS else f"{text}..."
        case int():
            is_short = abs(value) < 10**_MAX_DIGITS  # int to str is quadratic, and an error above 4300 digits
            return str(value) if is_short else f"a number of more than {_MAX_DIGITS} digits"
        case float():
            return repr(value)
        case list():
            return "an array"
        case _:
            return "an object"


def _wrong_type(known: Field, spelled: str, value: Any) -> InvalidType:
    of_type = ", a string" if isinstance(value, str) else ""
    return InvalidType(f"{spelled} is {shown(value)}{of_type}; expected {expected(known)}.", param=spelled)


def _malformed(known: Field, spelled: str, value: str, *, hint: str = "") -> InvalidValue:
    return InvalidValue(f"{spelled} is {shown(value)}; expected {expected(known)}{hint}.", param=spelled)


def _integer(known: Field, spelled: str, value: Any, is_json: bool) -> int:
    if is_json:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(known, spelled, value)
        if abs(value) >= 10**_MAX_DIGITS:  # the same limit as in a form; JSON itself has none
            raise InvalidValue(
                f"{spelled} has too many digits; at most {_MAX_DIGITS} digits are allowed.", param=spelled
            )
        return value
    if not _INTEGER.fullmatch(value):
        hint = f" of at most {_MAX_DIGITS} digits, without blanks, plus sign or leading zeros"
        raise _malformed(known, spelled, value, hint=hint)
    return int(value)


def _number(known: Field, spelled: str, value: Any, is_json: bool) -> float:
    if is_json:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(known, spelled, value)
    elif not _NUMBER.fullmatch(value):
        raise _malformed(known, spelled, value, hint=", without blanks or plus sign")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidValue(f"{spelled} is {shown(value)}; expected a finite number.", param=spelled)
    return number


def _boolean(known: Field, spelled: str, value: Any, is_json: bool) -> bool:
    if isinstance(value, bool):
        return value
    if is_json:
        raise _wrong_type(known, spelled, value)
    word = value.lower()
    if word not in _TRUE | _FALSE:
        raise _malformed(known, spelled, value)
    return word in _TRUE


def _text(known: Field, spelled: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(known, spelled, value)
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ):  # JSON can contain half of a surrogate pair, which is not a character (RFC 8259 section 8.2)
        raise InvalidValue(f"{spelled} contains half of a surrogate pair; send valid Unicode.", param=spelled) from None
    # Forms sent by browsers turn every line break into CR LF; the prompt is the same.
    return value.replace("\r\n", "\n")


def _choice(known: Field, spelled: str, value: Any) -> str:
    word = _text(known, spelled, value)
    if word not in known.choices:
        plain = {_plain_word(choice): choice for choice in known.choices} if known.spellings else {}
        found = {**plain, **known.spellings}.get(_plain_word(word))
        if found:
            return found
        choices = ", ".join(known.choices)
        raise InvalidValue(f"{spelled} is {shown(word)}; choose one of: {choices}.", param=spelled)
    return word


def _plain_word(word: str) -> str:
    """Return a word without what programs write differently in the name of a scheduler: case, blanks, `_` and `-`."""
    return re.sub(r"[ _-]", "", word.lower())


def _size(known: Field, spelled: str, value: Any) -> Resolution | None:
    word = _text(known, spelled, value)
    if word == "auto":
        return None
    try:
        return Resolution.parse(_TIMES.sub("x", word, count=1))
    except ValueError as error:
        raise InvalidValue(f"{spelled} is {shown(word)}; {error}, or auto.", param=spelled) from None


def parse_value(known: Field, spelled: str, value: Any, is_json: bool) -> Any:
    """Parse one value by its field's kind; check the field's own bounds, unless the operator can set narrower ones.

    Args:
        known: the field.
        spelled: the field's name as the client wrote it, for messages.
        value: text of a form, or any JSON value.
        is_json: whether `value` is from JSON.

    Raises:
        InvalidType: the JSON value has another type.
        InvalidValue: the text does not parse, or the value is out of range or not one of the choices.
    """
    match known.kind:
        case "integer":
            parsed: Any = _integer(known, spelled, value, is_json)
        case "number":
            parsed = _number(known, spelled, value, is_json)
        case "boolean":
            return _boolean(known, spelled, value, is_json)
        case "choice":
            return _choice(known, spelled, value)
        case "size":
            return _size(known, spelled, value)
        case _:
            return _text(known, spelled, value)
    if known.limit is None:  # else `check_limits` checks both, so that a message gives the limit that applied
        check_range(spelled, parsed, known.low, known.high, "the API")
    return parsed


def parse_weights(known: Field, entries: Sequence[tuple[str, Any]], is_json: bool) -> dict[str, float]:
    """Parse all entries of a field that is an object of numbers: `x` as an object or its JSON text, and `x[KEY]`.

    Args:
        known: the field.
        entries: names as the client wrote them, and values as received.
        is_json: whether the values are from JSON.

    Raises:
        InvalidType: a value has another type.
        InvalidValue: a text is not JSON, a number is out of range, or a key has two different numbers.
    """
    found: dict[str, float] = {}
    for spelled, raw in entries:
        match = _KEY.fullmatch(spelled)
        if match is None and spelled != known.name:
            raise InvalidType(f"{spelled} is no key of {known.name}; send {known.name}[KEY].", param=spelled)
        if match is not None:
            pairs = {match[1]: _number(known, spelled, raw, is_json)}
        else:
            members = _object(known, spelled, raw)
            pairs = {key: _member(known, spelled, key, value) for key, value in members.items()}
        for key, number in pairs.items():
            if known.low is not None and known.high is not None and not known.low <= number <= known.high:
                raise InvalidValue(
                    f"{spelled} has {number:g} for {shown(key)}; the API allows {known.low:g} to {known.high:g}.",
                    param=spelled,
                )
            if found.setdefault(key, number) != number:
                raise InvalidValue(
                    f"{spelled} has {number:g} for {shown(key)}, but it was sent before as {found[key]:g}; send it "
                    "once.",
                    param=spelled,
                )
    return found


def _object(known: Field, spelled: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidValue(
                f"{spelled} is {shown(value)}, which is not valid JSON; expected an object of numbers.", param=spelled
            ) from None
    else:
        parsed = value
    if not isinstance(parsed, dict):
        raise _wrong_type(known, spelled, parsed)
    return parsed


def _member(known: Field, spelled: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType(f"{spelled}: {shown(key)} is {shown(value)}; expected a number.", param=spelled)
    return _number(known, spelled, value, True)


def check_range(spelled: str, value: float, low: float | None, high: float | None, limited_by: str) -> None:
    """Raise InvalidValue unless the value is within the inclusive bounds; `limited_by` names what sets them."""
    if low is not None and value < low:
        raise InvalidValue(
            f"{spelled} is {_plain(value)}; {limited_by} requires at least {_plain(low)}.", param=spelled
        )
    if high is not None and value > high:
        raise InvalidValue(f"{spelled} is {_plain(value)}; {limited_by} allows at most {_plain(high)}.", param=spelled)


def _plain(number: float) -> str:
    return shown(int(number) if abs(number) < 1e15 and float(number).is_integer() else number)
