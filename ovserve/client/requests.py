"""The commands `edit`, `generate` and `vary`: from the command line to files."""

from __future__ import annotations

import glob
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ovserve.client.ownserver import own_server
from ovserve.client.server import File, ImageServer, Picture
from ovserve.client.terminal import ProgressLine, picture_protocol, shown_picture

__all__ = ["DEFAULT_URL", "PictureRequest", "expand", "run_requests"]

DEFAULT_URL = "http://127.0.0.1:8000"
STANDARD = "-"  # standard input or output
_EXTENSIONS = {"jpeg": "jpg"}


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """What one command asks for.

    Attributes:
        endpoint: edits, generations or variations.
        inputs: the pictures, one request for each; () for generations. `-` is standard input.
        fields: the fields of the form.
        mask: the mask's file, or None.
        box: a rectangle as the mask: x, y, width, height in pixels; None for none.
        output: where to write; None for names made from the input's.
        url: the server; empty: one of this machine, started for the command.
        key: the API key.
        is_json: print the result as JSON.
        shows: whether to show the pictures in the terminal.
    """

    endpoint: str
    inputs: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    mask: str | None = None
    box: tuple[int, int, int, int] | None = None
    output: str | None = None
    url: str = DEFAULT_URL
    key: str = ""
    is_json: bool = False
    shows: bool = True


def expand(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the files that names and glob patterns stand for, in their order. Raises ValueError for none."""
    found: list[str] = []
    for pattern in patterns:
        is_plain = pattern == STANDARD or Path(pattern).exists()
        matches = [pattern] if is_plain else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"{pattern[:200]}: no such file")
        found += matches
    return tuple(found)


def run_requests(request: PictureRequest) -> None:
    """Make the pictures and write them. SIGTERM and SIGINT raise KeyboardInterrupt; the server then cancels the job.

    Runs in: the main thread.

    Raises:
        KeyboardInterrupt: the user stopped the command.
        NoServer, Refused: see `ImageServer.run`.
        ValueError: an input or the mask cannot be used.
        OSError: a file cannot be read or written.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as stack:
        url = request.url or stack.enter_context(_started())
        server = ImageServer(url, request.key)
        for number, name in enumerate(request.inputs or ("",)):
            _run_one(server, request, _Input(name, number))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _started() -> Iterator[str]:
    if sys.stderr.isatty():
        print("Starting a server with the built-in model ...", file=sys.stderr)
    with own_server() as url:
        yield url


@dataclass(frozen=True, slots=True)
class _Input:
    """One of the inputs: its name, `-` for standard input or "" for none, and its number from 0."""

    name: str
    number: int

    @property
    def path(self) -> Path | None:
        """The file, if it is one."""
        return Path(self.name) if self.name not in ("", STANDARD) else None


def _run_one(server: ImageServer, request: PictureRequest, source: _Input) -> None:
    files = _files(request, source.name)
    count = request.fields.get("n", "1")
    line = ProgressLine(sys.stderr, int(count) if count.isascii() and count.isdigit() else 1)
    try:
        pictures = server.run(request.endpoint, request.fields, files, line.update)
    finally:
        line.clear()
    numbers = range(len(pictures)) if len(pictures) > 1 else (None,)
    paths = [_write(request, source, k, picture) for k, picture in zip(numbers, pictures, strict=True)]
    _report(request, source.name, pictures, paths)


def _files(request: PictureRequest, name: str) -> list[File]:
    if not name:
        return []
    content = sys.stdin.buffer.read() if name == STANDARD else Path(name).read_bytes()
    files = [File("image", "stdin" if name == STANDARD else Path(name).name, content)]
    if request.mask is not None:
        files.append(File("mask", Path(request.mask).name, Path(request.mask).read_bytes()))
    if request.box is not None:
        from ovserve.client.masks import box_mask  # noqa: PLC0415 - Pillow is needed for a box only

        files.append(File("mask", "box.png", box_mask(content, request.box)))
    return files


def _write(request: PictureRequest, source: _Input, number: int | None, picture: Picture) -> str:
    """Write one picture, the `number`-th of several or the only one; return the path, or `-`."""
    if request.output == STANDARD:
        sys.stdout.buffer.write(picture.content)
        sys.stdout.buffer.flush()
        return STANDARD
    kind = str(picture.fields.get("output_format", "png"))
    path = _path(request, source, number, _EXTENSIONS.get(kind, kind))
    path.write_bytes(picture.content)
    return str(path)


def _path(request: PictureRequest, source: _Input, number: int | None, extension: str) -> Path:
    """Return where to write: `-o` as given, numbered where it stands for several pictures; else beside the input."""
    verb = {"edits": "edited", "variations": "varied"}.get(request.endpoint, "generated")
    marks = [] if number is None else [str(number + 1)]
    if request.output is None:
        base = source.path.with_name(f"{source.path.stem}-{verb}") if source.path else Path(verb)
        return _unused(base.with_name("-".join([base.name, *marks]) + f".{extension}"))
    if Path(request.output).is_dir():
        stem = source.path.stem if source.path else verb
        return Path(request.output) / ("-".join([stem, *marks]) + f".{extension}")
    base = Path(request.output)
    if len(request.inputs) > 1:
        marks = [str(source.number + 1), *marks]
    return base.with_name("-".join([base.stem, *marks]) + base.suffix)


def _unused(path: Path) -> Path:
    """Return the path, or the first of `NAME-2`, `NAME-3`, ... that does not exist: no file is overwritten unasked."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def _report(request: PictureRequest, name: str, pictures: Sequence[Picture], paths: Sequence[str]) -> None:
    out: TextIO = sys.stderr if request.output == STANDARD else sys.stdout
    protocol = picture_protocol(os.environ) if request.shows and out.isatty() and not request.is_json else ""
    for picture, path in zip(pictures, paths, strict=True):
        if request.is_json:
            document: dict[str, Any] = {"input": name or None, "file": path, **picture.fields}
            print(json.dumps(document), file=out)
            continue
        out.writelines(shown_picture(picture.content, protocol, Path(path).name))
        if path != STANDARD or out.isatty():
            print(f"{path}  seed {picture.fields.get('seed')}", file=out)
    out.flush()
