"""Parser for the head of one part of a multipart body: field lines to a PartHead, or an error with its offset.

    part-head = *( field-line CRLF ) CRLF         RFC 2046 section 5.1 and RFC 7578 section 4, without folded lines

The syntax is strict, because two parsers must not read one head differently: no folded lines, no bare CR or LF, no
control characters, no known field twice. Fields may come in any order and case, and unknown fields are ignored.

A file name is exempt, because it is never used: it may be in any character set and contain control characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from ovserve.front.http1.headers import TOKEN, parse_disposition

__all__ = ["PartHead", "parse_part_head"]

Refuse = Callable[[str, int], NoReturn]  # (what is wrong, offset in the head)


class PartHead(NamedTuple):
    """The declarations of a part's head. The filename is never used as a path."""

    name: str
    filename: str | None = None
    content_type: str | None = None  # as sent, without leading and trailing blanks
    transfer_encoding: str = "binary"  # lower case
    content_length: int | None = None


_FIELD_NAME = re.compile(TOKEN.encode())
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CONTROL_CHARACTER = re.compile(_CONTROL.pattern.decode())
_LINE_CONTROL = re.compile(rb"[\x00\n\r]")
# A byte of a Content-Disposition field that is a control character or no UTF-8 is held as a lone surrogate, U+DC00 plus
# its value, until it is known whether it is in the file name. Decoded UTF-8 has no surrogates.
_FOREIGN_BASE = 0xDC00
_FOREIGN = re.compile("[\udc00-\udcff]")
_LENGTH = re.compile(r"[0-9]{1,18}")
_KNOWN = ("content-disposition", "content-type", "content-transfer-encoding", "content-length")


def parse_part_head(head: bytes, refuse: Refuse) -> PartHead:
    """Parse a head that ends with its blank line.

    Args:
        head: the field lines and the blank line, in bytes as received.
        refuse: is called with the error text and its offset in the head; must raise. Nothing else is raised.
    """
    fields = _parse_field_lines(head, refuse)
    if "content-disposition" not in fields:
        refuse("Content-Disposition is missing", 0)
    value, at = fields["content-disposition"]
    try:
        kind, name, filename = parse_disposition(value)
    except ValueError as error:
        refuse(f"Content-Disposition: {error}", at)
    if _FOREIGN.search(name or ""):
        refuse("Content-Disposition: the name is not UTF-8 or has a control character", at)
    if filename is not None:
        filename = _FOREIGN.sub(lambda match: chr(ord(match[0]) - _FOREIGN_BASE), filename)
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
    """Return the known fields by lower-case name, each with the offset of its line. Unknown fields are checked too."""
    fields: dict[str, tuple[str, int]] = {}
    at = 0
    for line in head[:-2].split(b"\r\n")[:-1]:
        if line[:1] in (b" ", b"\t"):
            refuse("folded field line", at)
        raw_name, colon, raw_value = line.partition(b":")
        is_disposition = raw_name.lower() == b"content-disposition"
        if control := (_LINE_CONTROL if is_disposition else _CONTROL).search(line):
            refuse(f"control character 0x{line[control.start()]:02x} in a field line", at + control.start())
        if not colon:
            refuse("field line without a colon", at)
        if not _FIELD_NAME.fullmatch(raw_name):
            refuse("field name is not a token", at)
        name = raw_name.decode("ascii").lower()
        try:
            value = (_decode_disposition(raw_value) if is_disposition else raw_value.decode("utf-8")).strip(" \t")
        except UnicodeDecodeError as error:
            refuse("field line is not UTF-8", at + len(raw_name) + 1 + error.start)
        if name in _KNOWN:
            if name in fields:
                refuse(f"{name} is given twice", at)
            fields[name] = (value, at)
        at += len(line) + 2
    return fields


def _decode_disposition(value: bytes) -> str:
    """Return the text of a Content-Disposition field, its foreign bytes as lone surrogates."""
    text = value.decode("utf-8", "surrogateescape")
    return _CONTROL_CHARACTER.sub(lambda match: chr(_FOREIGN_BASE + ord(match[0])), text)
