"""Reader for request bodies: named fields and spooled uploads, within the limits. Multipart here, JSON in `jsonform`.

Names and values reach the API as they were sent. The API gives `x[]`, `x[key]` and repeated names their meaning.
"""

from __future__ import annotations

import binascii
import re

from ovserve.accounts import Holding
from ovserve.errors import BadRequest, InvalidType, InvalidValue, PartTooLarge, UnsupportedMediaType
from ovserve.front.forms.jsonform import decode_in_place, read_json
from ovserve.front.forms.multipart import MultipartParser, PartBegin, PartEnd
from ovserve.front.forms.spooled import Body, SpooledForm, SpooledUpload, receive
from ovserve.front.http1.headers import parse_options
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore, Segment

__all__ = ["read_form"]

# The name of a part decides whether it is a picture: openai-python sends bytes without a filename, curl a prompt with
# one.
_IMAGE_NAME = re.compile(r"(?:images?|image_url|mask)(?:\[[^\[\]]*\])?")
_UTF_8 = ("utf-8", "utf8", "us-ascii", "ascii")
# The other charsets here are those that clients declare by default, whatever the text is (RFC 7578 section 5.1.2).
_CHARSETS = {
    **dict.fromkeys(_UTF_8, "utf-8"),
    **dict.fromkeys(("iso-8859-1", "iso8859-1", "latin1", "latin-1"), "latin-1"),
    **dict.fromkeys(("windows-1252", "cp1252"), "cp1252"),
}
_IDENTITY = ("binary", "8bit", "7bit")  # RFC 2045 section 6.2: no transformation
# RFC 7578 section 4.7 deprecates it, but curl and mail libraries send it. One byte takes at most three, and a soft line
# break three more on every line.
_QUOTED = "quoted-printable"
_ENCODED_FACTOR = 4  # bytes of an encoded text field for one byte of its limit
_SUPPORTED = "multipart/form-data or application/json"


def read_form(
    body: Body, content_type: str | None, spool: BlobStore, settings: Settings, holding: Holding | None = None
) -> SpooledForm:
    """Receive and parse one body. The caller must release the form when the exchange ends.

    `holding` is what its bytes count for.

    Raises:
        UnsupportedMediaType: the body is neither multipart/form-data nor JSON in UTF-8.
        BadRequest: and its subclasses, when the body is malformed, above a limit, or URL-encoded.
        ContentTooLarge, SpoolFull: the body does not fit the spool or its limit.
        ApiError, ClientGone: raised by `body.readinto`.
    """
    main, parameters = _parse_content_type(content_type)
    if main == "multipart/form-data":
        form = SpooledForm(is_json=False, holding=holding)
        parser = MultipartParser(
            parameters.get("boundary", ""),
            max_parts=settings.max_parts,
            max_part_head_bytes=settings.max_part_head_bytes,
        )
    elif main == "application/json":
        if parameters.get("charset", "utf-8").lower() not in _UTF_8:
            raise UnsupportedMediaType(
                f"Content-Type: charset {parameters['charset']} is not supported; JSON is UTF-8 (RFC 8259)"
            )
        form, parser = SpooledForm(is_json=True, holding=holding), None
    elif main == "application/x-www-form-urlencoded":
        raise BadRequest(
            f"Content-Type {main} cannot contain a picture; send {_SUPPORTED} (with curl: -F name=value for each "
            "field, or -H 'Content-Type: application/json' together with -d)"
        )
    else:
        raise UnsupportedMediaType(f"Content-Type {main} is not supported; expected {_SUPPORTED}")
    try:
        if parser:
            _read_multipart(body, parser, form, spool, settings)
        else:
            read_json(body, form, spool, settings)
    except BaseException:
        form.release()
        raise
    return form


def _parse_content_type(content_type: str | None) -> tuple[str, dict[str, str]]:
    if not content_type:
        raise UnsupportedMediaType(f"Content-Type is missing; expected {_SUPPORTED}")
    try:
        return parse_options(content_type)
    except ValueError as error:
        raise BadRequest(f"Content-Type: {error}") from None


def _read_multipart(
    body: Body, parser: MultipartParser, form: SpooledForm, spool: BlobStore, settings: Settings
) -> None:
    """Receive and parse a multipart body. The content of a part has the same offset in the segment as in the body."""
    part: PartBegin | None = None
    limit = settings.max_text_field_bytes
    for segment, begin, end in receive(body, form, spool, settings.max_body_bytes):
        with segment.view[begin:end] as piece:
            events = parser.feed(piece)
        for event in events:
            if isinstance(event, PartBegin):
                part = event
                _check_part(part)
            elif isinstance(event, PartEnd) and part is not None:
                _add_part(form, segment, part, event.size, limit)
                part = None
        if (
            part is not None
            and part.filename is None
            and not _is_image(part)
            and end - part.offset > _ENCODED_FACTOR * limit
        ):
            _refuse_text_size(part, limit)  # without receiving the rest
    parser.finish()


def _check_part(part: PartBegin) -> None:
    """Raise InvalidValue when a part has an encoding, type or charset that is not supported."""
    is_text = part.transfer_encoding == _QUOTED and part.filename is None and not _IMAGE_NAME.fullmatch(part.name)
    if part.transfer_encoding not in (*_IDENTITY, "base64") and not is_text:
        raise InvalidValue(
            f"field {part.name!r}: Content-Transfer-Encoding {part.transfer_encoding!r} is not supported;"
            " send the bytes without an encoding",
            param=part.name,
        )
    if part.content_type is None:
        return
    try:
        main, parameters = parse_options(part.content_type)
    except ValueError as error:
        raise InvalidValue(f"field {part.name!r}: Content-Type: {error}", param=part.name) from None
    if main.startswith("multipart/"):
        raise InvalidValue(
            f"field {part.name!r}: nested {main} is not supported (RFC 7578 section 4.3);"
            " send each file as a separate part",
            param=part.name,
        )
    charset = parameters.get("charset", "utf-8").lower()
    if charset not in _CHARSETS:
        raise InvalidValue(f"field {part.name!r}: charset {charset!r} is not supported; send UTF-8", param=part.name)


def _is_image(part: PartBegin) -> bool:
    """Return whether a part has the name of a picture and is more than a plain string."""
    if not _IMAGE_NAME.fullmatch(part.name):
        return False
    plain = part.content_type is None or parse_options(part.content_type)[0] == "text/plain"
    return part.filename is not None or not plain


def _add_part(form: SpooledForm, segment: Segment, part: PartBegin, size: int, limit: int) -> None:
    """Add a complete part to the form: as a picture by its name, else as text, else as a file for the API to reject.

    A part with an empty file name and no bytes is a file input of a browser's form without a file, and is left out.
    """
    if part.filename == "" and not size:
        return
    if part.transfer_encoding == "base64":
        size = decode_in_place(segment.view, part.offset, size, part.name)
    elif part.transfer_encoding == _QUOTED:
        size = _decode_quoted(segment, part, size)
    if not _is_image(part):
        if size <= limit:
            text = _decode_text(segment, part, size)
            if text is not None:
                form.fields.append((part.name, text))
                return
        elif part.filename is None:
            _refuse_text_size(part, limit)
    form.uploads.append(SpooledUpload(part.name, part.filename, segment, part.offset, size))


def _decode_quoted(segment: Segment, part: PartBegin, size: int) -> int:
    """Decode quoted-printable text in place (RFC 2045 section 6.7); return the number of decoded bytes."""
    with segment.view[part.offset : part.offset + size] as view:
        text = binascii.a2b_qp(bytes(view))
        view[: len(text)] = text
    return len(text)


def _decode_text(segment: Segment, part: PartBegin, size: int) -> str | None:
    """Decode a part; None for a file that is not text. Raises InvalidValue for a field that is not in its charset."""
    declared = (
        "utf-8" if part.content_type is None else parse_options(part.content_type)[1].get("charset", "utf-8").lower()
    )
    charset = _CHARSETS[declared]
    with segment.view[part.offset : part.offset + size] as view:
        try:
            return str(view, charset)
        except UnicodeDecodeError as error:
            if part.filename is not None:
                return None
            expected = "UTF-8" if charset == "utf-8" else declared
            raise InvalidValue(
                f"field {part.name!r} is not {expected} text (part {part.number}, byte {part.offset + error.start})",
                param=part.name,
            ) from None


def _refuse_text_size(part: PartBegin, limit: int) -> None:
    if _IMAGE_NAME.fullmatch(part.name):
        raise InvalidType(
            f"field {part.name!r}: expected a file (a part with a filename), but got a long text;"
            " data URLs are accepted only in JSON bodies",
            param=part.name,
        )
    raise PartTooLarge(f"field {part.name!r} is longer than {limit} bytes", param=part.name)
