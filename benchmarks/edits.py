"""Encoded requests for a load: pictures, masks, prompts and form fields.

Each request has a different picture, prompt and seed, so that no server can answer from a cache; `same=1` switches that
off.
"""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["BUILTIN_NAME", "BUILTIN_PATH", "Body", "Kind", "parse_kind"]

BUILTIN_NAME = "ovserve-builtin"  # the built-in model in the request field `model`
BUILTIN_PATH = Path("builtin:shapes")  # the built-in model in the option `path`
BOUNDARY = "----ovserve-benchmark-7c1f0a"
TASKS = {"edit": "edits", "masked": "edits", "generate": "generations", "variation": "variations"}
OWN_KEYS = {"picture_px", "upload_bytes", "same"}  # attributes of a kind; any other key is a form field
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
PICTURES = 4096  # number of different drawn pictures: more than a window has requests, so that no cache answers
LARGE_PICTURES = 4  # number of different noise pictures; each may take megabytes
SEED = 7


@dataclass(frozen=True, slots=True)
class Body:
    """A request body with its media type."""

    task: str  # edits, generations or variations: the last segment of the path
    media_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request in a mix.

    Attributes:
        name: the text it was parsed from; used in the report.
        task: edit, masked (an edit with a mask), generate or variation.
        weight: its share of the mix, relative to the other kinds.
        picture_px: side of the uploaded picture.
        upload_bytes: approximate size of the upload; 0: the size of the drawn picture.
        same: send the same picture, prompt and seed in every request.
        fields: further form fields.
    """

    name: str
    task: str = "edit"
    weight: int = 1
    picture_px: int = 256
    upload_bytes: int = 0
    same: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)

    def body(self, index: int) -> Body:
        """Return request number `index`; the same bytes each time."""
        number = 0 if self.same else index
        texts = {"prompt": prompt(number), "seed": str(number), **self.fields}
        if self.task == "variation":
            del texts["prompt"]
        if self.task == "generate":
            values = {key: int(text) if text.isdecimal() else text for key, text in texts.items()}
            return Body(TASKS[self.task], "application/json", json.dumps(values).encode())
        files = {"image": picture(self.picture_px, self.upload_bytes, number)}
        if self.task == "masked":
            files["mask"] = mask(self.picture_px, number)
        return Body(TASKS[self.task], f"multipart/form-data; boundary={BOUNDARY}", encode_form(texts, files))


def parse_kind(text: str, shared: Mapping[str, str] | None = None) -> Kind:
    """Parse a kind of request, such as `masked*2:num_inference_steps=4;size=256x256`.

    Args:
        text: `TASK[*WEIGHT][:key=value[;key=value]]`.
        shared: form fields of every kind; fields in `text` override them.

    Raises:
        ValueError: `text` does not have this form.
    """
    head, _, tail = text.partition(":")
    task, _, weight = head.partition("*")
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    keys = dict(shared or {})
    for item in filter(None, tail.split(";")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is not of the form key=value")
        keys[key] = value
    own = {key: int(keys.pop(key)) for key in OWN_KEYS & keys.keys()}
    return Kind(
        name=text,
        task=task,
        weight=int(weight or 1),
        picture_px=own.get("picture_px", 256),
        upload_bytes=own.get("upload_bytes", 0),
        same=bool(own.get("same", 0)),
        fields=keys,
    )


def prompt(index: int) -> str:
    """Return one of 720 prompts that the built-in model was trained for."""
    shape, rest = SHAPES[index % 8], index // 8
    colour = COLOURS[rest % 10]
    background = COLOURS[(rest % 10 + 1 + rest // 10 % 9) % 10]
    return f"a {colour} {shape} on a {background} background"


def picture(side_px: int, upload_bytes: int, index: int) -> bytes:
    """Return a PNG; with `upload_bytes`, a noise picture of about that many bytes, and `side_px` is ignored."""
    if upload_bytes:
        return noise_picture(max(8, round((upload_bytes / 3) ** 0.5)), index % LARGE_PICTURES)
    return drawn_picture(side_px, index % PICTURES)


@functools.cache
def drawn_picture(side_px: int, index: int) -> bytes:
    """Return a PNG of a disc on a plain background, with random position, size and colours."""
    rng = random.Random(SEED * 1_000_003 + index)
    background, foreground = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
    image = Image.new("RGB", (side_px, side_px), background)
    radius = side_px * rng.uniform(0.15, 0.3)
    x, y = (rng.uniform(radius, side_px - radius) for _ in range(2))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=foreground)
    return _png(image)


@functools.cache
def noise_picture(side_px: int, index: int) -> bytes:
    """Return an uncompressed PNG of noise: its size in bytes is about three times the number of its pixels."""
    pixels = np.random.default_rng(SEED + index).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return _png(Image.fromarray(pixels), compress_level=0)


@functools.lru_cache(maxsize=64)
def mask(side_px: int, index: int) -> bytes:
    """Return a PNG of a white rectangle on black; every server measured here repaints white."""
    rng = random.Random(SEED + index % 32)
    image = Image.new("L", (side_px, side_px), 0)
    left, top = (rng.randrange(side_px // 2) for _ in range(2))
    ImageDraw.Draw(image).rectangle((left, top, left + side_px // 2 - 1, top + side_px // 2 - 1), fill=255)
    return _png(image)


def encode_form(texts: Mapping[str, str], files: Mapping[str, bytes]) -> bytes:
    """Return a multipart/form-data body (RFC 7578): text fields, then PNG files."""
    pieces = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in texts.items()
    ]
    for name, data in files.items():
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="{name}.png"'
        pieces += [f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n".encode(), data, b"\r\n"]
    return b"".join([*pieces, f"--{BOUNDARY}--\r\n".encode()])


def _png(image: Image.Image, compress_level: int = 6) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=compress_level)
    return stream.getvalue()
