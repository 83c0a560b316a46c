"""LoRA adapters in the settings: the tables `[[model.lora]]` and `[[model.composite]]`, and the flag `source_loras`.

An adapter and a composite (several adapters with a weight each) are names for the request field `model`. The flag has
the reference server's syntax: `ALIAS=SOURCE[:ALPHA]` and `ALIAS=@ALIAS[:ALPHA]+@ALIAS...`, separated by commas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError

__all__ = [
    "MAX_ADAPTERS",
    "MAX_ALPHA",
    "CompositeSettings",
    "LoraSettings",
    "LoraSource",
    "parse_composites",
    "parse_loras",
    "parse_source_loras",
]

MAX_ADAPTERS = 64  # of one model; each is part of every call of the models that it changes
MAX_ALPHA = 100.0  # either sign; pictures are destroyed far below
FILE_ENDING = ".safetensors"  # no other format: pickle formats run code when they are read
_ALIAS = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # the reference server's grammar
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """One adapter: a `[[model.lora]]` table.

    Attributes:
        alias: its name for the request fields `model` and `lora_alphas`.
        path: its file.
        alpha: its weight if neither the request nor a composite gives one.
    """

    alias: str
    path: Path
    alpha: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeSettings:
    """Several adapters under one name: a `[[model.composite]]` table.

    Attributes:
        alias: its name for the request field `model`.
        components: alias and weight of each adapter; None for the adapter's own weight.
    """

    alias: str
    components: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class LoraSource:
    """One adapter as the flag `source_loras` names it.

    Attributes:
        kind: file, url or repository.
        place: path, address, or name of the repository.
        file: name of the file in the repository; empty for the only one.
        alpha: its weight; None if the flag gives none.
    """

    alias: str
    kind: str
    place: str
    file: str = ""
    alpha: float | None = None


def parse_loras(tables: object, title: str) -> tuple[LoraSettings, ...]:
    """Return the adapters of `[[model.lora]]` tables. Raises SettingsError; `title` begins its messages."""
    found = []
    for where, table in _numbered(tables, f"{title}: [[model.lora]]"):
        _check_keys(table, ("alias", "path", "alpha"), where)
        path = Path(_text(table, "path", where))
        _check_file_name(path.name, where)
        alias = _text(table, "alias", where) if "alias" in table else path.stem
        found.append(LoraSettings(alias=alias, path=path, alpha=_alpha(table.get("alpha", 1.0), f"{where}: alpha")))
    return tuple(found)


def parse_composites(tables: object, title: str) -> tuple[CompositeSettings, ...]:
    """Return the composites of `[[model.composite]]` tables. Raises SettingsError; `title` begins its messages.

    `components` is a table of weights by alias, or a list of aliases.
    """
    found = []
    for where, table in _numbered(tables, f"{title}: [[model.composite]]"):
        _check_keys(table, ("alias", "components"), where)
        alias, given = _text(table, "alias", where), table.get("components")
        components: list[tuple[str, float | None]]
        if isinstance(given, dict):
            components = [
                (name, _alpha(value, f"{where}: components.{name[:_SHOWN_CHARS]}")) for name, value in given.items()
            ]
        elif isinstance(given, list) and all(isinstance(name, str) for name in given):
            components = [(name, None) for name in given]
        else:
            raise SettingsError(f"{where}: components must be a table of weights by alias, or a list of aliases")
        found.append(CompositeSettings(alias=alias, components=tuple(components)))
    return tuple(found)


def _numbered(tables: object, title: str) -> list[tuple[str, dict[str, Any]]]:
    """Return tables with their titles for messages. Raises SettingsError for anything else."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{title}: write each entry as such a table")
    if len(tables) > MAX_ADAPTERS:
        raise SettingsError(f"{title}: {len(tables)} tables; at most {MAX_ADAPTERS} are allowed")
    return [(f"{title} {number}", table) for number, table in enumerate(tables, 1)]


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in table:
        if name not in known:
            raise SettingsError(f"{where}: unknown option {name[:_SHOWN_CHARS]!r}; expected {', '.join(known)}")


def _text(table: Mapping[str, Any], name: str, where: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise SettingsError(f"{where}: {name} must be a non-empty string")
    return value


def _check_file_name(name: str, where: str) -> None:
    if not name.endswith(FILE_ENDING):
        raise SettingsError(
            f"{where}: {name[:_SHOWN_CHARS]!r} does not end with {FILE_ENDING}; no other format is read"
        )


def _alpha(value: object, where: str) -> float:
    """Return a weight. Raises SettingsError unless it is a finite number within ±MAX_ALPHA."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_ALPHA <= value <= MAX_ALPHA:
        shown = repr(value)[:_SHOWN_CHARS] if isinstance(value, str | float) else "the value"
        raise SettingsError(f"{where}: {shown} is not a number from {-MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return float(value)


# --- the flag ---


def parse_source_loras(text: str) -> tuple[tuple[LoraSource, ...], tuple[CompositeSettings, ...]]:
    """Return the adapters and the composites that the flag names. Raises SettingsError."""
    sources: list[LoraSource] = []
    composites: list[CompositeSettings] = []
    for entry in text.split(","):
        alias, separator, source = entry.strip().partition("=")
        where = f"source_loras: {entry.strip()[:_SHOWN_CHARS]!r}"
        if not separator or not source:
            raise SettingsError(f"{where}: expected ALIAS=SOURCE")
        if not _ALIAS.fullmatch(alias):
            raise SettingsError(f"{where}: the alias may have letters, digits and ._- only")
        if source.startswith("@"):
            composites.append(_composite(alias, source, where))
        else:
            sources.append(_source(alias, source, where))
    if len(sources) > MAX_ADAPTERS or len(composites) > MAX_ADAPTERS:
        raise SettingsError(f"source_loras: at most {MAX_ADAPTERS} adapters are allowed")
    known = {source.alias for source in sources}
    for composite in composites:
        for name, _ in composite.components:
            if name not in known:
                raise SettingsError(f"source_loras: {composite.alias}: {name[:_SHOWN_CHARS]!r} is not an adapter")
    return tuple(sources), tuple(composites)


def _composite(alias: str, source: str, where: str) -> CompositeSettings:
    components: list[tuple[str, float | None]] = []
    for part in source.split("+"):
        name, separator, alpha = part.removeprefix("@").partition(":")
        if not part.startswith("@") or not name:
            raise SettingsError(f"{where}: each component must begin with @ and an alias")
        components.append((name, _text_alpha(alpha, where) if separator else None))
    return CompositeSettings(alias=alias, components=tuple(components))


def _source(alias: str, source: str, where: str) -> LoraSource:
    """Return an adapter; a colon begins a weight unless it belongs to an address or a drive."""
    head, separator, tail = source.rpartition(":")
    is_scheme = tail.startswith("//") or (len(head) == 1 and tail[:1] in ("\\", "/"))
    place, alpha = (head, _text_alpha(tail, where)) if separator and not is_scheme else (source, None)
    if place.startswith(("http://", "https://")):
        _check_file_name(place, where)
        return LoraSource(alias, "url", place, place.rsplit("/", 1)[-1], alpha)
    if place.startswith(("/", "./", "../", ".\\")) or place[1:2] == ":":
        _check_file_name(place, where)
        return LoraSource(alias, "file", place, "", alpha)
    repository, separator, file = place.partition("@")
    if not _REPOSITORY.fullmatch(repository):
        raise SettingsError(f"{where}: {place[:_SHOWN_CHARS]!r} is neither a path, an address nor OWNER/REPOSITORY")
    if separator:
        _check_file_name(file, where)
    return LoraSource(alias, "repository", repository, file, alpha)


def _text_alpha(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -MAX_ALPHA <= value <= MAX_ALPHA:
        raise SettingsError(f"{where}: {text[:_SHOWN_CHARS]!r} is not a number from {-MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return value
