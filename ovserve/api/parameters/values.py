"""One field's value by its kind: text of a form, or a JSON value, to a value within the field's own bounds.

Numbers of a form are written as clients' own `str()` writes them, without blanks, signs or leading zeros; JSON values keep their
types. Every error names the field as the client spelled it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ovserve.api.parameters.fields import Field
from ovserve.errors import InvalidType, InvalidValue
from ovserve.settings.options import Resolution

__all__ = ["check_range", "expected", "parse_value"]

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,39})")
_NUMBER = re.compile(r"-?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,4})?")
_LARGEST = 10**40
_TRUE, _FALSE = frozenset(("true", "1")), frozenset(("false", "0"))


def expected(known: Field) -> str:
    """What a field takes, in words."""
    words = {"text": "a string", "integer": "a whole number", "number": "a number", "boolean": "true or false",
             "choice": "a string", "size": "a string", "file": "a file", "files": "a file", "object": "an object"}  # fmt: skip
    return words[known.kind]


def _wrong_type(known: Field, spelled: str, value: Any) -> InvalidType:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
    }
    got = names.get(type(value), "null")
    return InvalidType(f"Invalid type for '{spelled}': expected {expected(known)}, but got {got}.", param=spelled)


def _not_a(known: Field, spelled: str, value: str) -> InvalidValue:
    return InvalidValue(
        f"Invalid value for '{spelled}': expected {expected(known)}, but got '{value[:100]}'.", param=spelled
    )


def _integer(known: Field, spelled: str, value: Any, is_json: bool) -> int:
    if is_json:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(known, spelled, value)
        if abs(value) >= _LARGEST:  # as many digits as a form may have; JSON has no end of them
            raise InvalidValue(f"Invalid value for '{spelled}': a number of more than 40 digits.", param=spelled)
        return value
    if not _INTEGER.fullmatch(value):
        raise _not_a(known, spelled, value)
    return int(value)


def _number(known: Field, spelled: str, value: Any, is_json: bool) -> float:
    if is_json:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(known, spelled, value)
    elif not _NUMBER.fullmatch(value):
        raise _not_a(known, spelled, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidValue(f"Invalid value for '{spelled}': expected a finite number.", param=spelled)
    return number


def _boolean(known: Field, spelled: str, value: Any, is_json: bool) -> bool:
    if isinstance(value, bool):
        return value
    if is_json:
        raise _wrong_type(known, spelled, value)
    word = value.lower()
    if word not in _TRUE | _FALSE:
        raise _not_a(known, spelled, value)
    return word in _TRUE


def _text(known: Field, spelled: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(known, spelled, value)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which is no character (RFC 8259 section 8.2)
        raise InvalidValue(
            f"Invalid value for '{spelled}': it holds half of a surrogate pair.", param=spelled
        ) from None
    # Browser-made forms turn every line break into CR LF; the prompt means the same.
    return value.replace("\r\n", "\n")


def _choice(known: Field, spelled: str, value: Any) -> str:
    word = _text(known, spelled, value)
    if word == "jpg" and "jpeg" in known.choices:
        return "jpeg"
    if word not in known.choices:
        listed = ", ".join(f"'{choice}'" for choice in known.choices)
        raise InvalidValue(
            f"Invalid value for '{spelled}': '{word[:100]}'. Supported values are: {listed}.", param=spelled
        )
    return word


def _size(known: Field, spelled: str, value: Any) -> Resolution | None:
    word = _text(known, spelled, value)
    if word == "auto":
        return None
    try:
        return Resolution.parse(word)
    except ValueError as error:
        raise InvalidValue(
            f"Invalid value for '{spelled}': '{word[:100]}': {error}, or 'auto'.", param=spelled
        ) from None


def parse_value(known: Field, spelled: str, value: Any, is_json: bool) -> Any:
    """One value by its field's kind, within the field's own bounds. Raises InvalidType and InvalidValue."""
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
    check_range(spelled, parsed, known.low, known.high)
    return parsed


def check_range(spelled: str, value: float, low: float | None, high: float | None) -> None:
    """Raise InvalidValue unless the value lies within the inclusive bounds."""
    if low is not None and value < low:
        told = "higher than 0" if low == 1 else f"at least {low:g}"
        raise InvalidValue(f"Invalid value for '{spelled}': {value:g} must be {told}.", param=spelled)
    if high is not None and value > high:
        bound = str(high) if isinstance(high, int) else f"{high:g}"
        raise InvalidValue(
            f"Invalid value for '{spelled}': {value:g} is more than the maximum of {bound}.", param=spelled
        )
