#!/usr/bin/env python3
"""Write the sample pictures of the edit page for builtin:things: what ovserve/web/samples.json asks the model for.

Starts a server on a free port and sends it each sample as the page does. make_samples.py draws their source.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.live import LiveServer  # noqa: E402  needs the path above

MODEL = "things"
WEB = ROOT / "ovserve"


def main() -> None:
    """Write every picture."""
    samples = json.loads((WEB / "web" / "samples.json").read_text("utf-8"))[MODEL]
    with LiveServer("--model_path", f"builtin:{MODEL}") as server, httpx.Client(timeout=120) as client:
        for sample in samples:
            request(client, server.url, sample).save(WEB / sample["result"].lstrip("/"), optimize=True)


def request(client: httpx.Client, url: str, sample: dict[str, Any]) -> Image.Image:
    """Return the picture for a sample."""
    if "image" in sample:
        image = Image.open(WEB / sample["image"].lstrip("/"))
        files = {"image": ("image.png", png(image), "image/png")}
        if strokes := sample.get("strokes"):
            files["mask"] = ("mask.png", png(mask_of(strokes, image.size)), "image/png")
        reply = client.post(f"{url}/v3/images/edits", data=sample["settings"], files=files)
    else:
        fields = {name: int(value) if value.isdigit() else value for name, value in sample["settings"].items()}
        reply = client.post(f"{url}/v3/images/generations", json=fields)
    reply.raise_for_status()
    return Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))).convert("RGB")


def mask_of(strokes: list[dict[str, Any]], size: tuple[int, int]) -> Image.Image:
    """Return a mask in OpenAI's form: transparent where a stroke was painted."""
    alpha = Image.new("L", size, 255)
    draw = ImageDraw.Draw(alpha)
    for stroke in strokes:
        radius = stroke["size"] / 2
        for x, y in stroke["points"]:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    black = Image.new("L", size, 0)
    return Image.merge("RGBA", (black, black, black, alpha))


def png(image: Image.Image) -> bytes:
    """Return the file of a picture."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
