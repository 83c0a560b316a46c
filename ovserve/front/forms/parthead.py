"""The head of one part of a multipart body: field lines to a PartHead, or a refusal that says where.

    part-head = *( field-line CRLF ) CRLF         RFC 2046 section 5.1 and RFC 7578 section 4, without folded lines

Strict in syntax, for two readers of one head must not disagree: no folded lines, no bare CR or LF, no control characters, no
known field twice. Forgiving in what clients do send: fields in any order and case, and fields that mean nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from ovserve.front.http1.headers import TOKEN, parse_disposition

__all__ = ["PartHead", "parse_part_head"]

Refuse = Callable[[str, int], NoReturn]  # (what is wrong, at which byte of the head)


class PartHead(NamedTuple):
    """What the head of a part declares. Nothing in it is ever a path."""

    name: str
    filename: str | None = None
    content_type: str | None = None  # as sent, without the blanks around it
    transfer_encoding: str = "binary"  # lower case
    content_length: int | None = None


_FIELD_NAME = re.compile(TOKEN.encode())
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile(r"[0-9]{1,18}")
_KNOWN = ("content-disposition", "content-type", "content-transfer-encoding", "content-length")


def parse_part_head(head: bytes, refuse: Refuse) -> PartHead:
    """Parse a head that ends with its blank line; `refuse` is called with what is wrong and must raise."""
    fields = _parse_field_lines(head, refuse)
    if "content-disposition" not in fields:
        refuse("no Content-Disposition", 0)
    value, at = fields["content-disposition"]
    try:
        kind, name, filename = parse_disposition(value)
    except ValueError as error:
        refuse(f"Content-Disposition: {error}", at)
    if kind != "form-data":
        refuse("Content-Disposition is not form-data", at)
    if not name:
        refuse("Content-Disposition without a name", at)
    content_type = fields["content-type"][0] if "content-type" in fields else None
    encoding = fields["content-transfer-encoding"][0].lower() if "content-transfer-encoding" in fields else "binary"
    length = None
    if "content-length" in fields:
        value, at = fields["content-length"]
        if not _LENGTH.fullmatch(value):
            refuse("Content-Length is not a number", at)
        length = int(value)
    return PartHead(name, filename, content_type or None, encoding, length)


def _parse_field_lines(head: bytes, refuse: Refuse) -> dict[str, tuple[str, int]]:
    """The known fields by lower-case name, each with the place of its line; every line is checked, known or not."""
    fields: dict[str, tuple[str, int]] = {}
    at = 0
    for line in head[:-2].split(b"\r\n")[:-1]:
        if line[:1] in (b" ", b"\t"):
            refuse("folded field line", at)
        if control := _CONTROL.search(line):
            refuse(f"control character 0x{line[control.start()]:02x} in a field line", at + control.start())
        raw_name, colon, raw_value = line.partition(b":")
        if not colon:
            refuse("field line without a colon", at)
        if not _FIELD_NAME.fullmatch(raw_name):
            refuse("field name is not a token", at)
        name = raw_name.decode("ascii").lower()
        try:
            value = raw_value.decode("utf-8").strip(" \t")
        except UnicodeDecodeError as error:
            refuse("field line is not UTF-8", at + len(raw_name) + 1 + error.start)
        if name in _KNOWN:
            if name in fields:
                refuse(f"{name} twice", at)
            fields[name] = (value, at)
        at += len(line) + 2
    return fields
