"""What the commands show in a terminal: one line of progress, and pictures where the terminal can show them."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from ovserve.client.server import Progress

__all__ = ["ProgressLine", "picture_protocol", "shown_picture"]

_BAR_CHARS = 24
_CHUNK_CHARS = 4096  # of one escape sequence of the kitty protocol
_ROWS = 18  # height of a shown picture
PROTOCOLS = ("kitty", "iterm", "sixel")
_SIXEL_TERMS = ("foot", "mlterm", "contour", "yaft")
_KONSOLE_VERSION = "220400"  # the first with sixels


class ProgressLine:
    """Shows progress on one line of a terminal, written again and again; shows nothing if `stream` is no terminal.

    Args:
        stream: where to write.
        pictures: number of pictures that the job makes.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO, pictures: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._is_shown = stream.isatty()
        self._pictures = pictures
        self._clock = clock
        self._first: tuple[float, int] | None = None  # time and number of the first step that was seen
        self._length = 0

    def update(self, progress: Progress) -> None:
        """Show a line of progress."""
        if self._is_shown:
            self._write(self._line(progress))

    def clear(self) -> None:
        """Remove the line."""
        if self._is_shown and self._length:
            self._write("")
            self._stream.write("\r")
            self._stream.flush()

    def _line(self, progress: Progress) -> str:
        if not progress.steps:
            return progress.text
        done = (progress.picture - 1) * progress.steps + progress.step
        whole = max(self._pictures * progress.steps, done)
        filled = _BAR_CHARS * done // whole
        of = f"picture {progress.picture}/{self._pictures} " if self._pictures > 1 else ""
        bar = "#" * filled + "-" * (_BAR_CHARS - filled)
        return f"{of}step {progress.step}/{progress.steps} [{bar}]{self._left(done, whole)}"

    def _left(self, done: int, whole: int) -> str:
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        began_at, first = self._first
        if done == first:
            return ""
        return f" {(now - began_at) / (done - first) * (whole - done):.1f} s left"

    def _write(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = "".join(char for char in line if char.isprintable())[:width]
        self._stream.write("\r" + line.ljust(self._length))
        self._stream.flush()
        self._length = len(line)


def picture_protocol(environment: Mapping[str, str]) -> str:
    """Return how this terminal shows pictures: `kitty`, `iterm`, `sixel`, or "" if it is not known to.

    OVSERVE_PICTURES overrides what the other variables say, for a terminal that has no name of its own, such as xterm.
    """
    chosen = environment.get("OVSERVE_PICTURES", "")
    if chosen:
        return chosen if chosen in PROTOCOLS else ""
    if environment.get("TMUX") or environment.get("STY"):
        return ""  # multiplexers drop these sequences
    program, term = environment.get("TERM_PROGRAM", ""), environment.get("TERM", "")
    if environment.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "vscode"):
        return "iterm"
    shows_sixels = term.startswith(_SIXEL_TERMS) or environment.get("KONSOLE_VERSION", "") >= _KONSOLE_VERSION
    return "sixel" if shows_sixels else ""


def shown_picture(content: bytes, protocol: str, name: str = "") -> Iterator[str]:
    """Yield the escape sequences that show an encoded picture.

    Sources: the kitty graphics protocol (PNG only, `f=100`), and iTerm2's inline images protocol (any format); sixels
    are in `sixel`.
    """
    if protocol == "sixel":
        from ovserve.client.sixel import sixels  # noqa: PLC0415 - loads Pillow

        yield from sixels(content)
        return
    text = base64.b64encode(content).decode()
    if protocol == "kitty" and content.startswith(b"\x89PNG"):
        chunks = [text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS)]
        for number, chunk in enumerate(chunks):
            keys = f"a=T,f=100,r={_ROWS}," if number == 0 else ""
            yield f"\x1b_G{keys}m={int(number < len(chunks) - 1)};{chunk}\x1b\\"
        yield "\n"
    elif protocol == "iterm":
        label = base64.b64encode(name.encode()).decode()
        yield f"\x1b]1337;File=name={label};size={len(content)};inline=1;height={_ROWS}:{text}\x07\n"
