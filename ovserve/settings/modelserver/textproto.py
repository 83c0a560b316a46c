"""Reader of protocol buffers in text format, without their descriptors: names and values as they stand in the file.

https://protobuf.dev/reference/protobuf/textformat-spec/ Field types are not known here, so a number stays a token of
its text, and an identifier such as `true` or `STATIC` is one too. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Message", "Scalar", "parse", "quoted"]

MAX_CHARS = 1 << 20
MAX_FIELDS = 50_000
MAX_DEPTH = 32
_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\n\f\v]+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<number>-?[ \t]*(?:0[xX][0-9a-fA-F]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?)(?![A-Za-z0-9_.]))
      | (?P<name>-?[A-Za-z_][A-Za-z0-9_]*)
      | (?P<mark>[\[\]{}<>:;,./-])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:([abfnrtv\\'\"?])|([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_CLOSERS = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value that is no message.

    Attributes:
        text: the string's content, or the number or identifier as written.
        is_string: it was quoted.
        line: its line in the file, from 1.
    """

    text: str
    is_string: bool
    line: int


@dataclass(slots=True)
class Message:
    """A message: its fields in order. An `Any` has one field whose name is the type's URL in brackets.

    Attributes:
        line: the line on which it begins.
        fields: names and values.
    """

    line: int
    fields: list[tuple[str, Scalar | Message]] = field(default_factory=list)

    def all(self, name: str) -> list[Scalar | Message]:
        """Return every value of a field."""
        return [value for each, value in self.fields if each == name]

    def messages(self, name: str) -> list[Message]:
        """Return the values of a field that are messages."""
        return [value for value in self.all(name) if isinstance(value, Message)]


def quoted(text: str) -> str:
    """Return a string as a quoted value of the text format."""
    escaped = "".join(f"\\{char}" if char in '\\"' else char if char.isprintable() else _escaped(char) for char in text)
    return f'"{escaped}"'


def _escaped(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogatepass"))


def parse(text: str) -> Message:
    """Parse a whole file.

    Raises:
        ValueError: it is no text format, or above a limit; the message has the line.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARS} are read")
    return _Parser(text).run()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int


class _Parser:
    """One pass over the tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._fields = 0
        self._next = next(self._tokens)

    def run(self) -> Message:
        """Return the message that the file is."""
        message = Message(1)
        self._read_fields(message, "", 0)
        return message

    def _split(self) -> Iterator[_Token]:
        position, line = 0, 1
        while position < len(self._text):
            match = _TOKEN.match(self._text, position)
            if match is None:
                shown = self._text[position : position + 20].split("\n")[0]
                raise ValueError(f"line {line}: unexpected {shown!r}")
            kind = str(match.lastgroup)
            if kind != "blank":
                yield _Token(kind, match[0], line)
            line += match[0].count("\n")
            position = match.end()
        yield _Token("end", "", line)

    def _take(self) -> _Token:
        token = self._next
        if token.kind != "end":
            self._next = next(self._tokens)
        return token

    def _is_next(self, *marks: str) -> bool:
        return self._next.kind == "mark" and self._next.text in marks

    def _expect(self, mark: str) -> None:
        token = self._take()
        if token.kind != "mark" or token.text != mark:
            raise ValueError(f"line {token.line}: expected {mark!r}, found {token.text[:40]!r}")

    def _read_fields(self, message: Message, closer: str, depth: int) -> None:
        """Read fields up to the closing mark, or to the end of the file if `closer` is empty."""
        if depth > MAX_DEPTH:
            raise ValueError(f"line {message.line}: nested more than {MAX_DEPTH} levels deep")
        while not (self._is_next(closer) if closer else self._next.kind == "end"):
            name = self._read_name()
            has_colon = self._is_next(":")
            if has_colon:
                self._take()
            if self._is_next("["):
                self._read_list(message, name, depth)
            elif self._is_next("{", "<"):
                self._add(message, name, self._read_message(depth))
            elif has_colon:
                self._add(message, name, self._read_scalar())
            else:
                raise ValueError(f"line {self._next.line}: expected ':' or '{{' after {name!r}")
            if self._is_next(",", ";"):
                self._take()
        if closer:
            self._take()

    def _add(self, message: Message, name: str, value: Scalar | Message) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise ValueError(f"it has more than {MAX_FIELDS} fields")
        message.fields.append((name, value))

    def _read_name(self) -> str:
        token = self._take()
        if token.kind == "name" and not token.text.startswith("-"):
            return token.text
        if token.text != "[":
            raise ValueError(f"line {token.line}: expected a field's name, found {token.text[:40]!r}")
        parts = []
        while not self._is_next("]"):
            part = self._take()
            if part.kind not in ("name", "number", "mark") or part.text in "{}<>[:;,":
                raise ValueError(f"line {part.line}: wrong name in brackets: {part.text[:40]!r}")
            parts.append(part.text)
        self._take()
        return f"[{''.join(parts)}]"

    def _read_message(self, depth: int) -> Message:
        opener = self._take()
        message = Message(opener.line)
        self._read_fields(message, _CLOSERS[opener.text], depth + 1)
        return message

    def _read_list(self, message: Message, name: str, depth: int) -> None:
        self._take()
        while not self._is_next("]"):
            value = self._read_message(depth) if self._is_next("{", "<") else self._read_scalar()
            self._add(message, name, value)
            if not self._is_next("]"):
                self._expect(",")
        self._take()

    def _read_scalar(self) -> Scalar:
        token = self._take()
        if token.kind == "string":
            parts = [_unquote(token.text, token.line)]
            while self._next.kind == "string":  # adjacent strings are one
                parts.append(_unquote(self._take().text, token.line))
            return Scalar("".join(parts), True, token.line)
        if token.kind not in ("number", "name"):
            raise ValueError(f"line {token.line}: expected a value, found {token.text[:40]!r}")
        return Scalar(token.text, False, token.line)


def _unquote(text: str, line: int) -> str:
    """Return the content of a quoted string. Octal and hexadecimal escapes are bytes of UTF-8. Raises ValueError."""
    content, position = bytearray(), 1
    for match in _ESCAPE.finditer(text, 1, len(text) - 1):
        content += text[position : match.start()].encode("utf-8", "surrogatepass")
        position = match.end()
        simple, octal, hexadecimal, unicode, other = match.groups()
        if other is not None:
            raise ValueError(f"line {line}: unknown escape \\{other}")
        if simple is not None:
            content += _SIMPLE.get(simple, simple).encode()
        elif unicode is not None:
            content += chr(int(unicode, 16)).encode("utf-8", "surrogatepass")
        else:
            value = int(octal, 8) if octal is not None else int(hexadecimal, 16)
            if value > 255:
                raise ValueError(f"line {line}: the escape \\{octal} is above 255")
            content.append(value)
    content += text[position:-1].encode("utf-8", "surrogatepass")
    try:
        return content.decode("utf-8")
    except ValueError:
        raise ValueError(f"line {line}: the string is not UTF-8") from None
