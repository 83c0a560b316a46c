"""Use image tools of agent libraries as programs do, with the names that they send on their own.

Usage: python agents.py BASE_URL. `scripts/try-clients` installs the libraries and runs this program; it is too heavy
for every run of the tests. Each line of output is one call.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import requests
from agno.tools.dalle import DalleTools
from agno.tools.openai import OpenAITools
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from openai import OpenAI
from PIL import Image

PROMPT = (
    "A vibrant, minimalist digital illustration of a red star centered on a blue background, with crisp edges, soft "
    "ambient lighting and a playful mood, rendered in ultra high definition, trending on design sites."
)
SOURCE = "tests/data/red_circle.png"


def size_of(data: bytes) -> tuple[int, int]:
    """Return the size of an encoded picture."""
    return Image.open(io.BytesIO(data)).size


def of_url(url: str) -> tuple[int, int]:
    """Return the size of the picture at a URL."""
    return size_of(requests.get(url, timeout=60).content)


def langchain(url: str) -> tuple[int, int]:
    """Generate with LangChain's tool, which sends no response_format and reads `.url`."""
    return of_url(DallEAPIWrapper(base_url=url, api_key="none", model="dall-e-3", size="256x256").run(PROMPT))


def agno_dalle(_: str) -> tuple[int, int]:
    """Generate with agno's DalleTools, which reads `.url`."""
    images = DalleTools(size="256x256").create_image(PROMPT).images or []
    return of_url(str(images[0].url))


def agno_openai(_: str) -> tuple[int, int]:
    """Generate with agno's OpenAITools."""
    images = OpenAITools(image_size="256x256").generate_image(PROMPT).images or []
    return size_of(images[0].content or b"")


def two_images(url: str) -> tuple[int, int]:
    """Edit with the official client and two images, as chat programs do for a second edit."""
    with open(SOURCE, "rb") as first, open(SOURCE, "rb") as second:
        reply: Any = OpenAI(base_url=url, api_key="none").images.edit(
            model="gpt-image-1", image=[first, second], prompt=PROMPT, background="transparent"
        )
    return size_of(base64.b64decode(reply.data[0].b64_json))


CLIENTS: dict[str, Callable[[str], tuple[int, int]]] = {
    "langchain-community": langchain,
    "agno (DalleTools)": agno_dalle,
    "agno (OpenAITools)": agno_openai,
    "openai": two_images,
}


def main() -> None:
    """Run every client."""
    url = sys.argv[1]
    os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"}
    for name, client in CLIENTS.items():
        print(f"{name} {version(name.partition(' ')[0])}: {client(url)}", flush=True)


if __name__ == "__main__":
    main()
