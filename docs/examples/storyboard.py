"""Draw a storyboard: one picture for each line of a text file, all with one seed, so that they look alike.

    python storyboard.py SCENES.txt OUTPUT.png [SEED]

Needs: pip install openai pillow
"""

import base64
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI
from PIL import Image

client = OpenAI(base_url=os.environ.get("OVSERVE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
COLUMNS = 3
AT_ONCE = 4  # the server denoises requests that arrive together in shared calls


def draw(scene: str, seed: int) -> Image.Image:
    """Return the picture of one scene."""
    reply = client.images.generate(prompt=scene, extra_body={"seed": seed})
    return Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json)))


def main(path: str, output: str, seed: int = 7) -> None:
    """Draw every scene and write the sheet."""
    with open(path, encoding="utf-8") as file:
        scenes = [line.strip() for line in file if line.strip()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pictures = list(pool.map(lambda scene: draw(scene, seed), scenes))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(pictures) // COLUMNS) * height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % COLUMNS * width, number // COLUMNS * height))
    sheet.save(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
