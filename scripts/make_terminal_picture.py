#!/usr/bin/env python3
"""Write docs/pictures/terminal.png: `ovserve edit` in xterm, with the picture as sixels, and the progress of another.

Needs Xvfb, xterm, xwd and script(1) on PATH; the tests do not. xterm emulates a VT340, which shows sixels.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.live import LiveServer  # noqa: E402  importable only after the line above

PICTURE = ROOT / "docs" / "pictures" / "terminal.png"
SIZE_PX = (820, 352)
LIMIT_S = 60
COMMANDS = (
    "ovserve edit photo.png -p 'a green circle on a blue background' --seed 3 --strength 0.5",
    "ovserve edit photo.png -p 'a yellow star on a blue background' --steps 100 --seed 6",
)


def screen(folder: Path, url: str) -> Image.Image:
    """Return what xterm shows while the second command runs."""
    environment = {
        **os.environ,
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "OVSERVE_URL": url,
        "OVSERVE_PICTURES": "sixel",
    }
    first, second = COMMANDS
    show = [f"printf '$ %s\\n' {shlex.quote(command)}" for command in COMMANDS]
    lines = (show[0], first, show[1], f"exec script -qfc {shlex.quote(second)} typescript")
    (folder / "run.sh").write_text("\n".join(lines))
    reading, writing = os.pipe()
    width, height = SIZE_PX
    display = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", f"{width}x{height}x24", "-nolisten", "tcp"],
        pass_fds=(writing,),
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as numbers:
        environment["DISPLAY"] = ":" + numbers.readline().strip()
    look = ["-fa", "DejaVu Sans Mono", "-fs", "11", "-geometry", "100x18+0+0", "-bg", "white", "-fg", "black"]
    resources = ["-xrm", "XTerm*numColorRegisters: 256", "-xrm", "XTerm*borderWidth: 0"]
    terminal = subprocess.Popen(
        ["xterm", "-ti", "vt340", *look, *resources, "-e", "bash", "run.sh"], cwd=folder, env=environment
    )
    try:
        wait_for(folder / "typescript", rb"step [3-6]\d/\d+ .*left")
        taken = subprocess.run(["xwd", "-root", "-silent"], env=environment, check=True, capture_output=True)
    finally:
        terminal.terminate()
        terminal.wait()
        display.terminate()
        display.wait()
    return decoded(taken.stdout)


def wait_for(path: Path, pattern: bytes) -> None:
    """Return when the file contains the pattern."""
    deadline = time.monotonic() + LIMIT_S
    while not (path.exists() and re.search(pattern, path.read_bytes())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} does not contain {pattern!r}")
        time.sleep(0.02)


def decoded(dump: bytes) -> Image.Image:
    """Return the picture of a dump of 32 bits a pixel (XWDFile.h, version 7)."""
    fields = struct.unpack(">25I", dump[:100])
    header_bytes, width, height, line_bytes, colours = fields[0], fields[4], fields[5], fields[12], fields[19]
    pixels = np.frombuffer(dump[header_bytes + colours * 12 :], np.uint8)[: height * line_bytes]
    rows = pixels.reshape(height, line_bytes)[:, : width * 4].reshape(height, width, 4)
    return Image.fromarray(np.ascontiguousarray(rows[:, :, 2::-1]))


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as name, LiveServer(spool=Path(name)) as server:
        folder = Path(name) / "work"
        folder.mkdir()
        shutil.copy(ROOT / "tests" / "data" / "red_circle.png", folder / "photo.png")
        screen(folder, server.url).quantize(128, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    sys.stdout.write(f"wrote {PICTURE.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
