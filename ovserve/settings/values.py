"""Parse and check the value of one option, by the annotation and the bounds in the tables of options."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovserve.settings.options import Option, Resolution

__all__ = ["SHOWN_CHARS", "check_bounds", "parse_text", "parse_toml", "shortened"]

SHOWN_CHARS = 100  # of a wrong value, quoted in a message


def parse_text(kind: str, text: str) -> Any:
    """Parse one value of a flag or a variable by the annotation of its option. Raises ValueError."""
    if "\0" in text:  # a system call with such a path or name raises
        raise ValueError("must not contain a NUL character")
    base = kind.removesuffix(" | None")
    if base != kind and text in ("", "none"):
        return None
    parsers: dict[str, Callable[[str], Any]] = {
        "str": str,
        "bool": _parse_bool,
        "tuple[str, ...]": lambda t: tuple(name for part in t.split(",") if (name := part.strip())),
        "int": lambda t: int(t, 10),
        "float": float,
        "Replicas": lambda t: 0 if t == "auto" else _at_least_one(int(t, 10)),
        "Path": Path,
        "Resolution": Resolution.parse,
        "tuple[Resolution, ...]": _parse_resolutions,
    }
    return parsers[base](text)


def _at_least_one(value: int) -> int:
    if value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def _parse_resolutions(text: str) -> tuple[Resolution, ...]:
    found = tuple(Resolution.parse(each) for each in text.replace(",", " ").split())
    if len(set(found)) < len(found):
        raise ValueError("a size is listed twice")
    return found


def _parse_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("expected true or false")
    return text == "true"


def parse_toml(kind: str, value: object) -> Any:
    """Check one value of the file by the annotation of its option. Raises ValueError."""
    base = kind.removesuffix(" | None")
    if base in ("str", "Path", "Resolution"):
        if not isinstance(value, str):
            raise ValueError("expected a string")
        return parse_text(kind, value)
    if base == "Replicas":
        if value == "auto":
            return 0
        return _at_least_one(parse_toml("int", value))
    if base == "bool":
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if base in ("tuple[str, ...]", "tuple[Resolution, ...]"):
        items = value if isinstance(value, list) else [value]
        names = [name for name in items if isinstance(name, str)]
        if len(names) < len(items):
            raise ValueError("expected a list of strings")
        return parse_text(kind, ",".join(names))
    if isinstance(value, bool) or not isinstance(value, int if base == "int" else int | float):
        raise ValueError("expected a whole number" if base == "int" else "expected a number")
    try:
        return int(value) if base == "int" else float(value)
    except OverflowError:
        raise ValueError("the number is too large") from None


def check_bounds(value: Any, option: Option, default: Any) -> None:
    """Raise ValueError if the value is outside the bounds of its option."""
    if value is None:
        return
    if value == "" and default:  # options that can be unset have no default, or accept `none`
        raise ValueError("must not be empty")
    if option.choices and value not in option.choices:
        raise ValueError(f"expected one of {', '.join(option.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    unit = f" {option.unit}" if option.unit else ""
    if option.low is not None and value < option.low:
        raise ValueError(f"must be at least {option.low:g}{unit}")
    if option.high is not None and value > option.high:
        raise ValueError(f"must be at most {option.high:g}{unit}")


def shortened(raw: object) -> str:
    """Return a wrong value as one short line for a message."""
    if isinstance(raw, dict | list):
        # Not written out: deep nesting would overflow the stack.
        return "{...}" if isinstance(raw, dict) else "[...]"
    if isinstance(raw, int) and raw.bit_length() > SHOWN_CHARS:
        return f"a number of {raw.bit_length()} bits"  # str() refuses very large integers
    text = str(raw)
    begin = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:SHOWN_CHARS])
    return begin if len(text) <= SHOWN_CHARS else f"{begin}..."
