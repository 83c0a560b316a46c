"""The client of the picture commands: events, progress, masks, file names, terminal output."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.client.events import Event, EventParser
from ovserve.client.masks import box_mask, parse_box
from ovserve.client.requests import expand
from ovserve.client.server import ImageServer, Progress, parse_progress
from ovserve.client.terminal import ProgressLine, picture_protocol, shown_picture

STREAM = b': picture 1: step 1/2\n\nevent: image_edit.completed\ndata: {"a":\ndata: 1}\n\n: waiting\n\ndata: x\n\n'
EVENTS = [
    Event(comments=["picture 1: step 1/2"]),
    Event("image_edit.completed", '{"a":\n1}'),
    Event(comments=["waiting"]),
    Event(data="x"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_do_not_depend_on_how_the_stream_is_cut(cuts: list[int], line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end)
    points = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = EventParser(1000)
    found = [event for start, end in itertools.pairwise(points) for event in parser.feed(stream[start:end])]
    assert found == EVENTS


@given(st.binary(max_size=300), st.integers(1, 50))
def test_random_bytes_give_events_or_a_value_error(data: bytes, limit: int) -> None:
    parser = EventParser(limit)
    try:
        for byte in data:
            for event in parser.feed(bytes([byte])):
                assert isinstance(event, Event)
    except ValueError:
        pass


def test_long_lines_are_refused_before_they_are_kept() -> None:
    parser = EventParser(100)
    assert list(parser.feed(b"data: " + b"x" * 94)) == []
    with pytest.raises(ValueError, match="100 bytes"):
        list(parser.feed(b"x"))


@pytest.mark.parametrize(
    ("comment", "progress"),
    [
        ("picture 2: step 3/12", Progress(2, 3, 12)),
        ("queue: 3 ahead, about 9 s", Progress(text="queue: 3 ahead, about 9 s")),
        ("picture x: step 3/12", Progress(text="picture x: step 3/12")),
        ("picture 1: step 3", Progress(text="picture 1: step 3")),
        ("", Progress(text="")),
    ],
)
def test_progress_lines_are_read(comment: str, progress: Progress) -> None:
    assert parse_progress(comment) == progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_line_estimates_the_time_left_and_is_removed() -> None:
    now = 0.0
    terminal = Terminal()
    line = ProgressLine(terminal, pictures=2, clock=lambda: now)
    line.update(Progress(text="queue: 1 ahead\x1b[2J"))
    assert "\x1b" not in terminal.getvalue()  # text of a server cannot control the terminal
    for step in range(1, 5):
        now = step * 2.0
        line.update(Progress(1, step, 4))
    assert terminal.getvalue().rstrip(" ").endswith("picture 1/2 step 4/4 [############------------] 8.0 s left")
    line.clear()
    assert terminal.getvalue().endswith(" \r")
    silent = io.StringIO()
    ProgressLine(silent).update(Progress(1, 1, 2))
    assert silent.getvalue() == ""


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230804"}, "sixel"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "211203"}, ""),
        ({"TERM": "xterm-256color", "OVSERVE_PICTURES": "sixel"}, "sixel"),
        ({"TERM": "xterm-kitty", "OVSERVE_PICTURES": "none"}, ""),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, ""),
        ({"TERM": "xterm-256color"}, ""),
        ({}, ""),
    ],
)
def test_terminals_that_show_pictures_are_known(environment: dict[str, str], protocol: str) -> None:
    assert picture_protocol(environment) == protocol


def test_picture_sequences_carry_the_file() -> None:
    content = b"\x89PNG" + bytes(range(256)) * 40
    kitty = "".join(shown_picture(content, "kitty"))
    parts = [part.partition(";") for part in kitty.removesuffix("\n").removesuffix("\x1b\\").split("\x1b\\")]
    assert base64.b64decode("".join(text for _, _, text in parts)) == content
    assert [keys.endswith("m=1") for keys, _, _ in parts] == [True] * (len(parts) - 1) + [False]
    assert all(len(text) <= 4096 for _, _, text in parts)
    iterm = "".join(shown_picture(content, "iterm", "a.png"))
    assert base64.b64decode(iterm.rpartition(":")[2].removesuffix("\x07\n")) == content
    assert list(shown_picture(b"RIFF", "kitty")) == []
    assert list(shown_picture(content, "")) == []


def test_box_is_white_in_a_mask_of_the_upright_size() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    mask = np.asarray(Image.open(io.BytesIO(box_mask(buffer.getvalue(), (5, 10, 8, 100)))))
    assert mask.shape == (40, 20)
    expected = np.zeros((40, 20), np.uint8)
    expected[10:, 5:13] = 255
    assert np.array_equal(mask, expected)
    with pytest.raises(ValueError, match="outside the picture of 20x40"):
        box_mask(buffer.getvalue(), (20, 0, 1, 1))
    with pytest.raises(ValueError, match="cannot be read"):
        box_mask(b"no picture", (0, 0, 1, 1))


@given(st.text(max_size=30))
def test_boxes_are_four_numbers_or_an_error(text: str) -> None:
    try:
        box = parse_box(text)
    except ValueError as error:
        assert "X,Y,WIDTH,HEIGHT" in str(error) or "at least 1" in str(error)
    else:
        assert len(box) == 4
        assert min(box[2:]) >= 1


def test_patterns_become_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "[x].png"):
        (tmp_path / name).touch()
    names = expand([f"{tmp_path}/[x].png", f"{tmp_path}/*.png"])
    assert [Path(name).name for name in names] == ["[x].png", "[x].png", "a.png", "b.png"]
    with pytest.raises(ValueError, match="no such file"):
        expand([f"{tmp_path}/*.jpg"])


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "file:///etc/passwd"])
def test_only_http_urls_name_a_server(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL"):
        ImageServer(url)


class _Stream(BaseHTTPRequestHandler):
    """Streams the second picture before the first one."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        for index in (1, 0):
            event = {"b64_json": base64.b64encode(bytes([index])).decode(), "picture_index": index}
            self.wfile.write(f"event: image_edit.completed\ndata: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_streamed_pictures_are_returned_in_the_order_of_their_numbers() -> None:
    with HTTPServer(("127.0.0.1", 0), _Stream) as stand_in:
        threading.Thread(target=stand_in.handle_request, daemon=True).start()
        server = ImageServer(f"http://127.0.0.1:{stand_in.server_port}")
        pictures = server.run("edits", {"n": "2"}, [], lambda _: None)
    assert [picture.content for picture in pictures] == [b"\0", b"\1"]
