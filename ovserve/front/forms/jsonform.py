"""Parser for JSON bodies: fields and spooled uploads. Pictures are located first and decoded in place.

A picture is a data URL or bare base64 text. One of 50 MB must not pass through `json.loads`, which would hold the
interpreter lock for a long time and make three copies. Therefore the strings of the document are located first. Those
that begin like a picture are replaced with a placeholder. The rest is small and limited, and is parsed by the standard
library; everything that it accepts beyond RFC 8259 is refused.
"""

from __future__ import annotations

import binascii
import bisect
import json
import math
import re
import secrets
from typing import Any, NamedTuple, NoReturn

from ovserve.errors import BadRequest, InvalidValue, PartTooLarge, TooManyParts, UnknownParameter
from ovserve.front.forms.spooled import Body, SpooledForm, SpooledUpload, receive
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore, Segment

__all__ = ["decode_in_place", "read_json"]

MAX_DEPTH = 100  # of nested arrays and objects; the API needs four
PIECE_BYTES = 64 * 1024  # searched or decoded per step: fits the CPU's cache, and other threads can run in between
PREFIX_BYTES = 256  # the comma of a data URL must be within these
MEMBERS = ("image_url", "url", "b64_json")  # of an object that is a picture: the last is that of our own replies
# The members in which the API accepts pictures.
PICTURES = ("image", "images", "image_url", "init_images", "mask", "markup")

# Forms of a picture besides a bare string: `{"image_url": URL}` (images), `{"type": "input_image", "image_url": URL}`
# (responses), `{"type": "image_url", "image_url": {"url": URL}}` (chat), `{"url": URL}` and `{"b64_json": TEXT}`.
# `detail`, how closely a model looks at the picture, has no meaning here. These members and values are ignored.
_IGNORED: dict[str, tuple[str, ...]] = {"type": ("image_url", "input_image"), "detail": ("low", "high", "auto")}

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_TOKEN = re.compile(rb'[\[\]{}]|"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# How the text of a picture begins: as a data URL, or in base64 as PNG, JPEG, GIF, WebP, BMP, TIFF or AVIF. A text that
# only begins so stays a text.
_BEGIN = rb"(?i:data:)|iVBORw0KGgo|\\?/9j\\?/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK|AAAA[A-Za-z0-9+/][GWm2]Z0eX"
_begin = re.compile(_BEGIN)
BEGIN_BYTES = 16  # within which a text shows how it begins
# Everything up to the next string that may be a picture or has no closing quotation mark.
# An atomic group and not `(...)*+`: Python 3.11.2, as in Debian 12, matches nested possessive repeats wrongly.
_ORDINARY = re.compile(rb'(?>(?:[^"]*+"(?!%b)(?:[^"\\]++|\\.)*+")*)[^"]*+' % _BEGIN, re.DOTALL)
_BLANKS = b"\r\n\t "
# Escapes that encoders write in base64 text inside a JSON string: PHP escapes the slash, .NET the plus sign, Gson the
# equals sign, and some break the text into lines. Any other escape is not valid base64.
_ESCAPES = (
    (b"\\/", b"/"),
    (b"\\u002B", b"+"),
    (b"\\u002b", b"+"),
    (b"\\u002F", b"/"),
    (b"\\u002f", b"/"),
    (b"\\u003D", b"="),
    (b"\\u003d", b"="),
    (b"\\r", b""),
    (b"\\n", b""),
)
_LONGEST_ESCAPE = 6


class _Cut(NamedTuple):
    """The offsets of a string that begins like a picture, without its quotation marks."""

    begin: int
    end: int


def read_json(body: Body, form: SpooledForm, spool: BlobStore, settings: Settings) -> None:
    """Receive a JSON object into a segment and add its members to the form.

    Raises:
        BadRequest: and its subclasses, when the body is malformed or above a limit.
        ContentTooLarge, SpoolFull: the body does not fit the spool or its limit.
        ApiError, ClientGone: raised by `body.readinto`.
    """
    segment, size = None, 0
    for piece in receive(body, form, spool, settings.max_body_bytes):
        segment, _, size = piece
    if segment is None:
        raise BadRequest("JSON body: empty (byte 0)")
    with segment.view[:size] as document:
        scan = _Scan(document, settings.max_json_text_bytes, settings.max_parts)
        scan.run()
        members = _parse(scan)
        reader = _Reader(form, segment, scan, settings.max_text_field_bytes)
        for name, value in members.items():
            reader.add(name, value)


class _Scan:
    """Scanner that cuts the pictures out of a document and keeps the rest, at most `limit` bytes of it."""

    def __init__(self, document: memoryview, limit: int, most_cuts: int) -> None:
        self.document = document
        self.cuts: list[_Cut] = []
        self._limit = limit
        self._remaining = limit  # bytes left of the limit
        self._most_cuts = most_cuts
        self._mark = secrets.token_hex(8)  # random, so that a client cannot forge a placeholder
        self._kept = bytearray()
        self._places: list[tuple[int, int]] = []  # (offset in the kept text, offset in the document) of each piece
        self._depth = 0

    @property
    def text(self) -> bytes:
        """The document with a placeholder for each picture."""
        return bytes(self._kept)

    def run(self) -> None:
        """Scan the document. Raises BadRequest for a string without an end, deep nesting, or an exceeded limit."""
        position = 0
        while position < len(self.document):
            position = self._keep(position, _ORDINARY)
            if position < len(self.document):
                end = self._find_end_of_url(position)
                position = self._cut(position, end) if end else self._keep(position, _STRING)

    def cut_of(self, value: object) -> _Cut | None:
        """Return the picture that a placeholder stands for, or None for any other value."""
        if isinstance(value, str) and value.startswith(self._mark):
            return self.cuts[int(value[len(self._mark) :])]
        return None

    def place_of(self, kept_offset: int) -> int:
        """Return the offset in the body of a byte of the kept text."""
        index = bisect.bisect_right(self._places, (kept_offset, len(self.document))) - 1
        start, begin = self._places[index] if index >= 0 else (0, 0)
        return begin + kept_offset - start

    def _keep(self, begin: int, pattern: re.Pattern[bytes]) -> int:
        """Keep the text that the pattern matches at `begin`, and return the offset after it."""
        remaining, ahead = self._remaining, len(self.document) - begin
        match = pattern.match(self.document, begin, begin + remaining + 1)
        end = match.end() if match else begin
        size = end - begin
        cut_off = size <= remaining < ahead  # inside a string that has no end within the limit, or before a picture
        if size > remaining or (cut_off and not (pattern is _ORDINARY and self._may_be_picture(end))):
            raise PartTooLarge(
                f"JSON body: more than {self._limit} bytes of text outside its pictures (byte {begin});"
                ' send pictures as "data:image/png;base64,..."'
            )
        if pattern is _STRING and not size:
            raise BadRequest(f"JSON body: the string at byte {begin} has no closing quotation mark")
        piece = bytes(self.document[begin:end])
        self._check_depth(piece, begin)
        self._remaining -= size
        self._append(piece, begin)
        return end

    def _may_be_picture(self, quote: int) -> bool:
        return bool(_begin.match(bytes(self.document[quote + 1 : quote + 1 + BEGIN_BYTES])))

    def _check_depth(self, piece: bytes, place: int) -> None:
        for token in _TOKEN.finditer(piece):
            if token[0] in (b"[", b"{"):
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise BadRequest(f"JSON body: nested deeper than {MAX_DEPTH} (byte {place + token.start()})")
            elif token[0] in (b"]", b"}"):
                self._depth -= 1

    def _find_end_of_url(self, quote: int) -> int:
        """Return the offset of the closing quotation mark of the picture at `quote`; 0 when it is another string."""
        if not self._may_be_picture(quote):
            return 0
        begin, size = quote + 1, PREFIX_BYTES  # short first: text that begins like a picture is short
        while begin < len(self.document):
            at = bytes(self.document[begin : begin + size]).find(b'"')
            if at >= 0:
                # base64 never ends in a backslash, so this quotation mark is escaped and the string is ordinary text.
                return 0 if self.document[begin + at - 1] == ord("\\") else begin + at
            begin, size = begin + size, PIECE_BYTES
        raise BadRequest(f"JSON body: the string at byte {quote} has no closing quotation mark")

    def _cut(self, quote: int, end: int) -> int:
        if len(self.cuts) == self._most_cuts:
            raise TooManyParts(f"JSON body: more than {self._most_cuts} pictures (byte {quote})")
        self._append(b'"%s%d"' % (self._mark.encode(), len(self.cuts)), quote)
        self.cuts.append(_Cut(quote + 1, end))
        return end + 1

    def _append(self, piece: bytes, place: int) -> None:
        self._places.append((len(self._kept), place))
        self._kept += piece


def _parse(scan: _Scan) -> dict[str, Any]:
    """Return the members of the kept text, which must be one object. Raises BadRequest."""
    try:
        text = scan.text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"JSON body: not UTF-8 (byte {scan.place_of(error.start)})") from None
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_object_of,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        place = scan.place_of(len(text[: error.pos].encode()))
        raise BadRequest(f"JSON body: {error.msg} (byte {place})") from None
    except ValueError:  # the interpreter limits the digits of an integer
        raise BadRequest("JSON body: a number has too many digits") from None
    if not isinstance(parsed, dict):
        raise BadRequest("JSON body: expected an object")
    return parsed


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise BadRequest(f"JSON body: the key {name[:100]!r} is given twice in one object", param=name[:100])
            seen.add(name)
    return members


def _refuse_constant(text: str) -> NoReturn:
    raise BadRequest(f"JSON body: {text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRequest(f"JSON body: the number {text[:40]} is too large")
    return value


class _Reader:
    """Adds members to a form: pictures as uploads, everything else as fields."""

    def __init__(self, form: SpooledForm, segment: Segment, scan: _Scan, limit: int) -> None:
        self._form = form
        self._segment = segment
        self._scan = scan
        self._limit = limit

    def add(self, name: str, value: Any) -> None:
        """Add one member. Item k of a list of pictures gets the name `name[k]`, whether it is a picture or not."""
        self._check_key(name)
        if name not in PICTURES:
            self._form.fields.append((name, self._restore(value, name)))
            return
        items = [(f"{name}[{k}]", item) for k, item in enumerate(value)] if isinstance(value, list) else []
        for label, item in items or [(name, value)]:
            member = _member_of(item)
            inner = item[member] if member else item
            url = inner.get("url") if isinstance(inner, dict) else inner
            cut = self._scan.cut_of(url)
            if cut is None:
                if isinstance(url, str) and url[:5].lower() == "data:":
                    raise InvalidValue(f"{label}: a data URL must be written without escapes", param=label)
                self._form.fields.append((label, self._restore(item, label)))
                continue
            _check_neighbours(item, member, label)
            if inner is not item:
                _check_neighbours(inner, "url", f"{label}.{member}")
            self._form.uploads.append(self._decode(cut, label))

    def _decode(self, cut: _Cut, name: str) -> SpooledUpload:
        """Decode a data URL (RFC 2397) or bare base64 in place.

        The media type of a URL is ignored: the bytes identify the format better.
        """
        prefix = bytes(self._scan.document[cut.begin : min(cut.end, cut.begin + PREFIX_BYTES)])
        if not prefix.lower().startswith(b"data:"):
            size = decode_in_place(self._segment.view, cut.begin, cut.end - cut.begin, name, in_json=True)
            return SpooledUpload(name, None, self._segment, cut.begin, size)
        head, comma, _ = prefix.partition(b",")
        if not comma or not self._text_of(cut.begin, head).lower().endswith(";base64"):
            raise InvalidValue(
                f"{name}: expected data:image/png;base64, and base64 text (byte {cut.begin})", param=name
            )
        begin = cut.begin + len(head) + 1
        size = decode_in_place(self._segment.view, begin, cut.end - begin, name, in_json=True)
        return SpooledUpload(name, None, self._segment, begin, size)

    def _restore(self, value: Any, name: str) -> Any:
        """Return a value with its placeholders replaced by the text that the client sent.

        Raises:
            InvalidValue: a text has half of a surrogate pair.
            PartTooLarge: a text is longer than the limit.
            BadRequest: a key begins like a picture, or a text that begins so is not valid JSON.
        """
        if isinstance(value, str):
            cut = self._scan.cut_of(value)
            if cut is not None:
                value = self._restore_cut(cut, name)
            try:
                size = len(value.encode())
            except UnicodeEncodeError:
                raise InvalidValue(f"{name}: the text has half of a surrogate pair", param=name) from None
            if size > self._limit:
                raise PartTooLarge(f"{name}: longer than {self._limit} bytes", param=name)
            return value
        if isinstance(value, list):
            return [self._restore(item, name) for item in value]
        if isinstance(value, dict):
            for key in value:
                self._check_key(key)
            return {key: self._restore(item, name) for key, item in value.items()}
        return value

    def _check_key(self, key: str) -> None:
        cut = self._scan.cut_of(key)
        if cut is not None:
            raise BadRequest(f"JSON body: a key must not begin like a picture (byte {cut.begin})")
        self._restore(key, f"the key {key[:100]!r}")

    def _restore_cut(self, cut: _Cut, name: str) -> str:
        """Return the text of a string that is not a picture, such as a prompt that begins with `data:`."""
        if cut.end - cut.begin > self._limit:
            raise PartTooLarge(f"{name}: longer than {self._limit} bytes (byte {cut.begin})", param=name)
        return self._text_of(cut.begin, bytes(self._scan.document[cut.begin : cut.end]))

    def _text_of(self, begin: int, quoted: bytes) -> str:
        """Return the text between two quotation marks without its escapes."""
        try:
            return str(json.loads(b'"%b"' % quoted))
        except ValueError:
            raise BadRequest(f"JSON body: the string at byte {begin} is not valid JSON") from None


def _member_of(item: Any) -> str:
    """Return the member of an object in which a picture is; empty for a value that is no such object."""
    names = (name for name in MEMBERS if isinstance(item, dict) and item.get(name) is not None)
    return next(names, "")


def _check_neighbours(item: Any, picture: str, label: str) -> None:
    """Raise UnknownParameter when a member next to a picture is not one of the ignored ones."""
    if not isinstance(item, dict):
        return
    for key, other in item.items():
        if key != picture and other is not None and other not in _IGNORED.get(key, ()):
            name = key[:100]
            raise UnknownParameter(f"{label}: unsupported {name!r} next to {picture}", param=f"{label}.{name}")


def decode_in_place(view: memoryview, offset: int, size: int, name: str, *, in_json: bool = False) -> int:
    """Decode base64 text in place: the decoded bytes overwrite the text from `offset` on.

    Line breaks and blanks are allowed in the text (RFC 2045 section 6.8), inside a JSON string as escapes.

    Returns:
        The number of decoded bytes.

    Raises:
        InvalidValue: not base64 (RFC 4648 section 4). The padding may be left out; nothing may follow it.
    """
    taken, end, written = offset, offset + size, offset
    text = b""
    while taken < end:
        piece = bytes(view[taken : min(end, taken + PIECE_BYTES)])
        escape = piece.rfind(b"\\", len(piece) - _LONGEST_ESCAPE + 1) if taken + len(piece) < end else -1
        if escape > 0:
            piece = piece[:escape]  # the escape may continue in the next piece
        taken += len(piece)
        if not in_json:
            piece = piece.translate(None, _BLANKS)
        elif b"\\" in piece:
            for written_as, meant in _ESCAPES:
                piece = piece.replace(written_as, meant)
        text += piece
        whole = len(text) if taken == end else len(text) - len(text) % 4
        quads, text = text[:whole], text[whole:]
        if taken == end:
            quads += b"=" * (-len(quads) % 4)
        try:
            data = binascii.a2b_base64(quads, strict_mode=True)
        except binascii.Error as error:
            raise InvalidValue(f"{name}: invalid base64: {error} (before byte {taken})", param=name) from None
        if taken < end and len(data) < len(quads) // 4 * 3:
            raise InvalidValue(f"{name}: base64 text continues after its padding (before byte {taken})", param=name)
        view[written : written + len(data)] = data
        written += len(data)
    return written - offset
