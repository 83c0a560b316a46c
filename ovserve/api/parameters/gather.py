"""The names of a form: its values and uploads, grouped by the field that each name stands for.

A name may be spelled `x`, `x[]`, `x[k]` or otherwise (`fields.SPELLINGS`), and may be repeated. Absent values are left
out. Values are not parsed here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from ovserve.api.exchange import Form, Upload
from ovserve.api.parameters.fields import EDIT, FIELDS, GENERATION, VARIATION, Field, field_named
from ovserve.api.parameters.values import expected
from ovserve.errors import InvalidType, UnknownParameter, UnsupportedParameter

__all__ = ["PATHS", "Gathered", "gather", "is_empty", "refuse_unknown"]

PATHS = {EDIT: "images/edits", GENERATION: "images/generations", VARIATION: "images/variations"}  # for messages

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_EMPTY = frozenset(("", "null", "None", "undefined"))  # texts that clients write for an absent value


@dataclass(slots=True)
class Gathered:
    """A form's values and uploads by field name, in the order of the form.

    Attributes:
        values: for each field, the names as spelled and the values as received.
        uploads: for each field, the uploads.
        unknown: names that stand for no field, as spelled.
    """

    values: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)
    uploads: dict[str, list[Upload]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def gather(form: Form, endpoint: str) -> Gathered:
    """Group a form's values and uploads by field. Names that stand for no field are only listed.

    Raises:
        UnsupportedParameter: the endpoint, or every model, does not support a field.
        InvalidType: an upload for a field that is not a file.
    """
    gathered = Gathered()
    for spelled, value in form.fields:
        known = _find_field(spelled)
        if known is None:
            gathered.unknown.append(spelled)
            continue
        # The prompt may be the word "null", and an image given as text gets an error of its own. JSON's null is an
        # absent value for every field.
        if is_empty(value) and (value is None or known.name not in ("prompt", "image")):
            continue
        _check_supported(known, spelled, endpoint)
        gathered.values.setdefault(known.name, []).append((spelled, value))
    for upload in form.uploads:
        known = _find_field(upload.name)
        if known is None:
            gathered.unknown.append(upload.name)
            continue
        _check_supported(known, upload.name, endpoint)
        if known.kind not in ("file", "files"):
            raise InvalidType(f"{upload.name} is a file; expected {expected(known)}.", param=upload.name)
        gathered.uploads.setdefault(known.name, []).append(upload)
    return gathered


def is_empty(value: Any) -> bool:
    """Return whether a value counts as absent: JSON's null, or a text that clients write for it."""
    return value is None or (isinstance(value, str) and value in _EMPTY)


def refuse_unknown(gathered: Gathered) -> None:
    """Raise UnknownParameter for the first name that stands for no field; the message suggests the nearest one."""
    for spelled in gathered.unknown:
        near = difflib.get_close_matches(spelled[:64], FIELDS, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "/openapi.json lists the known ones."
        raise UnknownParameter(f"Unknown parameter {spelled[:200]!r}; {hint}", param=spelled[:200])


def _find_field(spelled: str) -> Field | None:
    match = _NAME.fullmatch(spelled)
    return field_named(match[1]) if match else None


def _check_supported(known: Field, spelled: str, endpoint: str) -> None:
    if not known.served:
        raise UnsupportedParameter(f"{spelled} ({known.text}) is not supported; remove it.", param=spelled)
    if endpoint not in known.endpoints:
        supporting = " and ".join(path for name, path in PATHS.items() if name in known.endpoints)
        raise UnsupportedParameter(
            f"{spelled} is not supported by {PATHS[endpoint]}, only by {supporting}; remove it.", param=spelled
        )
