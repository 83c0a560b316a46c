#!/usr/bin/env python3
"""Write the contact sheets of docs/editing.md: what the fields of a request do, on the built-in model.

Starts a server on a free port and sends it ordinary requests. Each row of a sheet shows the prompt and labelled
pictures.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.live import LiveServer  # noqa: E402  needs the path above
from tests.reader import Figure, draw_scene  # noqa: E402

MODEL = "ovserve-builtin"
SIDE_PX = 256
SHEETS = ROOT / "docs" / "sheets"
CELL_PX, LABEL_PX, CAPTION_PX = 164, 16, 18
CHECK_PX = 16  # of the pattern behind transparent parts


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a sheet: the prompt of its requests, and pictures with their labels."""

    prompt: str
    cells: Sequence[tuple[str, Image.Image]]


class Client:
    """Requests pictures from the server. The seed is fixed, so that a sheet can be made again."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def edit(self, image: Image.Image, prompt: str, mask: Image.Image | None = None, **fields: object) -> Image.Image:
        """Return one edited picture."""
        files = {"image": ("i.png", _png(image)), **({"mask": ("m.png", _png(mask))} if mask else {})}
        data = {"model": MODEL, "prompt": prompt, "seed": "7", **{name: str(value) for name, value in fields.items()}}
        reply = self._http.post("/v3/images/edits", data=data, files=files)
        reply.raise_for_status()
        return _picture(reply.json()["data"][0]["b64_json"])

    def generate(self, prompt: str, **fields: object) -> Image.Image:
        """Return one generated picture."""
        reply = self._http.post("/v3/images/generations", json={"model": MODEL, "prompt": prompt, **fields})
        reply.raise_for_status()
        return _picture(reply.json()["data"][0]["b64_json"])

    def previews(self, prompt: str, **fields: object) -> list[Image.Image]:
        """Return the previews of a generation, then its picture."""
        document = {"model": MODEL, "prompt": prompt, "seed": 7, "stream": True, "partial_images": 3, **fields}
        reply = self._http.post("/v3/images/generations", json=document)
        reply.raise_for_status()
        events = [block for block in reply.text.split("\n\n") if block.startswith("event:")]
        return [_picture(httpx.Response(200, text=event.partition("data: ")[2]).json()["b64_json"]) for event in events]


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def _sheet(rows: Iterable[Row]) -> Image.Image:
    rows = list(rows)
    width, height = max(len(row.cells) for row in rows) * CELL_PX, CAPTION_PX + LABEL_PX + CELL_PX
    sheet = Image.new("RGB", (width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        top = line * height
        draw.rectangle((0, top, width, top + CAPTION_PX - 1), fill="gainsboro")
        draw.text((4, top + 3), row.prompt, fill="black")
        for column, (label, picture) in enumerate(row.cells):
            x, y = column * CELL_PX, top + CAPTION_PX
            draw.text((x + 4, y + 2), label, fill="black")
            shown = _on_checks(picture)
            shown.thumbnail((CELL_PX - 4, CELL_PX - 4))
            sheet.paste(shown, (x + 2, y + LABEL_PX))
    return sheet


def _on_checks(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB; transparent parts show a pattern of grey squares."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    checks = Image.new("L", (picture.width // CHECK_PX + 1, picture.height // CHECK_PX + 1), 235)
    checks.putdata(
        [200 if (k % checks.width + k // checks.width) % 2 else 235 for k in range(checks.width * checks.height)]
    )
    size = (checks.width * CHECK_PX, checks.height * CHECK_PX)
    ground = checks.resize(size, Image.Resampling.NEAREST).crop((0, 0, *picture.size)).convert("RGBA")
    return Image.alpha_composite(ground, picture).convert("RGB")


def _scene(background: str, *figures: tuple[str, str, float, float, float]) -> Image.Image:
    """Return a drawing in the built-in model's size."""
    return Image.fromarray(draw_scene(background, [Figure(*figure) for figure in figures], SIDE_PX))


def strengths(client: Client) -> list[Row]:
    """Return edits at strengths from 0.2 to 1.0."""
    cases = (
        (_scene("yellow", ("white", "star", 128, 128, 68)), "a green star on a yellow background"),
        (_scene("black", ("white", "circle", 128, 128, 68)), "a red circle on a black background"),
        (_scene("blue", ("red", "circle", 128, 128, 68)), "a white cross on a blue background"),
        (_scene("purple", ("yellow", "square", 128, 128, 60)), "a yellow square on a green background"),
    )
    steps = [round(0.2 + 0.1 * k, 1) for k in range(9)]
    return [
        Row(prompt, [("source", image), *((f"{s}", client.edit(image, prompt, strength=s)) for s in steps)])
        for image, prompt in cases
    ]


def masks(client: Client) -> list[Row]:
    """Return rows of source, mask and result. Outside the mask, source and result are equal."""
    rows: list[Row] = []
    pair = _scene("green", ("black", "cross", 68, 128, 48), ("yellow", "square", 188, 128, 48))
    circle = _scene("blue", ("red", "circle", 128, 128, 68))
    cases = (
        (pair, (124, 56, 254, 200), "a black cross and a pink circle on a green background", 0),
        (circle, (48, 48, 208, 208), "a yellow star on a blue background", 0),
        (circle, (48, 48, 208, 208), "a yellow star on a blue background", 24),
        (circle, (40, 120, 220, 126), "blue background", 0),
        (circle, (48, 48, 208, 208), "blue background", 0),
    )
    for image, box, prompt, blur in cases:
        mask = Image.new("L", image.size, 0)
        mask.paste(255, box)
        label = "thin mask" if box[3] - box[1] < 16 else f"mask, blur {blur}" if blur else "mask"
        result = client.edit(image, prompt, mask, mask_blur=blur)
        rows.append(Row(prompt, [("source", image), (label, mask), ("result", result)]))
    return rows


def outpaintings(client: Client) -> list[Row]:
    """Return rows of a picture, the same with a transparent border, and the result."""
    rows: list[Row] = []
    cases = (
        (_scene("blue", ("red", "circle", 128, 128, 68)), (0, 0, 128, 0), "blue background"),
        (_scene("white", ("green", "square", 128, 150, 60)), (64, 64, 64, 0), "white background"),
    )
    for image, (left, top, right, bottom), prompt in cases:
        canvas = Image.new("RGBA", (image.width + left + right, image.height + top + bottom))
        canvas.paste(image, (left, top))
        rows.append(Row(prompt, [("source", image), ("with border", canvas), ("result", client.edit(canvas, prompt))]))
    return rows


def seeds(client: Client) -> list[Row]:
    """Return one prompt without a picture, and one edit, with several seeds; the last is the first again."""
    drawn = "two pink diamonds on a black background"
    edited = "a yellow star on a blue background"
    circle = _scene("blue", ("red", "circle", 128, 128, 68))
    numbers = (1, 2, 3, 4, 5, 1)
    return [
        Row(drawn, [(f"seed {seed}", client.generate(drawn, seed=seed)) for seed in numbers]),
        Row(edited, [(f"seed {seed}", client.edit(circle, edited, seed=seed, strength=0.8)) for seed in numbers]),
    ]


def fittings(client: Client) -> list[Row]:
    """Return a wide picture edited at several sizes, in each resize_mode."""
    wide = _scene("purple", ("yellow", "star", 128, 128, 80)).resize((512, 256))
    prompt = "a yellow star on a purple background"
    modes = ("crop", "pad", "stretch")
    sizes = ("256x256", "192x320", "auto")
    return [
        Row(
            prompt,
            [
                ("source 512x256", wide),
                *(
                    (f"{mode} {size}", client.edit(wide, prompt, strength=0.4, resize_mode=mode, size=size))
                    for size in sizes
                ),
            ],
        )
        for mode in modes
    ]


def previews(client: Client) -> list[Row]:
    """Return the previews of a stream, then its picture."""
    prompts = (
        "a red heart on a white background",
        "three white stars on a blue background",
        "a cyan ring on a red background",
    )
    rows: list[Row] = []
    for prompt in prompts:
        pictures = client.previews(prompt)
        labels: list[Any] = [f"preview {k}" for k in range(len(pictures) - 1)]
        rows.append(Row(prompt, list(zip([*labels, "final"], pictures, strict=True))))
    return rows


def main() -> None:
    """Write every sheet."""
    SHEETS.mkdir(exist_ok=True)
    with LiveServer() as live, closing(Client(live.url)) as client:
        for make in (strengths, masks, outpaintings, seeds, fittings, previews):
            _sheet(make(client)).save(SHEETS / f"{make.__name__}.png", optimize=True)
            sys.stdout.write(f"wrote docs/sheets/{make.__name__}.png\n")


if __name__ == "__main__":
    main()
