"""Requests for a load: pictures, masks, prompts and fields, different for each request, as bytes ready to send.

Every request differs from those before it in its picture, its prompt and its seed, so that no server answers from a cache of
earlier work unless a workload asks for that (`same=1`).
"""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Body", "Kind", "parse_kind"]

BOUNDARY = "----ovserve-benchmark-7c1f0a"
TASKS = {"edit": "edits", "masked": "edits", "generate": "generations", "variation": "variations"}
OWN_KEYS = {"picture_px", "upload_bytes", "same"}  # of a kind; any other key is a form field
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
PICTURES = 256  # different pictures of ordinary size
LARGE_PICTURES = 4  # and of uploads of a given size, where each may take megabytes
SEED = 7


@dataclass(frozen=True, slots=True)
class Body:
    """A request body with the media type it goes under."""

    task: str  # edits, generations, variations: the last segment of the path
    media_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request in a mix.

    Attributes:
        name: as given, for the report.
        task: edit, masked (an edit with a mask), generate, variation.
        weight: how often it comes, against the other kinds.
        picture_px: side of the uploaded picture.
        upload_bytes: about how large the upload is to be; 0: as small as the picture is.
        same: every request carries the same picture, prompt and seed.
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
        """The request with this number, the same bytes each time."""
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
    """`TASK[*WEIGHT][:key=value[;key=value]]`, such as `masked*2:num_inference_steps=4;size=256x256`. Raises ValueError.

    Args:
        text: the kind.
        shared: form fields of every kind; the kind's own win.
    """
    head, _, tail = text.partition(":")
    task, _, weight = head.partition("*")
    if task not in TASKS:
        raise ValueError(f"{task!r}: expected one of {', '.join(TASKS)}")
    keys = dict(shared or {})
    for item in filter(None, tail.split(";")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r}: expected key=value")
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
    """One of 720 prompts that the built-in model understands."""
    shape, rest = SHAPES[index % 8], index // 8
    colour = COLOURS[rest % 10]
    ground = COLOURS[(rest % 10 + 1 + rest // 10 % 9) % 10]
    return f"a {colour} {shape} on a {ground} background"


def picture(side_px: int, upload_bytes: int, index: int) -> bytes:
    """A PNG; with `upload_bytes` one of noise that takes about that many bytes, whatever `side_px` says."""
    if upload_bytes:
        return noise_picture(max(8, round((upload_bytes / 3) ** 0.5)), index % LARGE_PICTURES)
    return drawn_picture(side_px, index % PICTURES)


@functools.cache
def drawn_picture(side_px: int, index: int) -> bytes:
    """A disc on a plain ground, placed and coloured by chance."""
    chance = random.Random(SEED * 1_000_003 + index)
    ground, ink = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
    image = Image.new("RGB", (side_px, side_px), ground)
    radius = side_px * chance.uniform(0.15, 0.3)
    x, y = (chance.uniform(radius, side_px - radius) for _ in range(2))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    return _png(image)


@functools.cache
def noise_picture(side_px: int, index: int) -> bytes:
    """Noise, which no format makes smaller: the size of the file is the number of its pixels times three."""
    pixels = np.random.default_rng(SEED + index).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return _png(Image.fromarray(pixels), compress_level=0)


@functools.lru_cache(maxsize=64)
def mask(side_px: int, index: int) -> bytes:
    """A white rectangle on black: white is repainted by every server measured here."""
    chance = random.Random(SEED + index % 32)
    image = Image.new("L", (side_px, side_px), 0)
    left, top = (chance.randrange(side_px // 2) for _ in range(2))
    ImageDraw.Draw(image).rectangle((left, top, left + side_px // 2 - 1, top + side_px // 2 - 1), fill=255)
    return _png(image)


def encode_form(texts: Mapping[str, str], files: Mapping[str, bytes]) -> bytes:
    """A multipart/form-data body (RFC 7578): text fields, then PNG files."""
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
