"""Replace one segment of a picture: the mask comes from a segmentation, here all pixels of similar colour.

    python segment_inpaint.py PICTURE X Y "a yellow star" OUTPUT.png

The segment is found by a flood fill from the point X,Y; a segmentation model would give such a mask too.
Needs: pip install openai pillow
"""

import base64
import io
import os
import sys

from openai import OpenAI
from PIL import Image, ImageDraw, ImageFilter

client = OpenAI(base_url=os.environ.get("OVSERVE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
TOLERANCE = 60  # largest difference of colour within the segment


def segment_mask(picture: Image.Image, point: tuple[int, int]) -> bytes:
    """Return a PNG that is white on the segment and a few pixels around it."""
    marked = picture.convert("RGB")
    marker = (1, 254, 3)
    ImageDraw.floodfill(marked, point, marker, thresh=TOLERANCE)
    mask = Image.new("L", picture.size)
    mask.putdata([255 if pixel == marker else 0 for pixel in marked.getdata()])
    buffer = io.BytesIO()
    mask.filter(ImageFilter.MaxFilter(13)).save(buffer, "PNG")
    return buffer.getvalue()


def main(path: str, x: int, y: int, prompt: str, output: str) -> None:
    """Repaint the segment around the point."""
    mask = segment_mask(Image.open(path), (x, y))
    with open(path, "rb") as image:
        reply = client.images.edit(
            image=image, mask=("mask.png", mask), prompt=prompt, extra_body={"mask_mode": "luminance", "mask_blur": 3}
        )
    with open(output, "wb") as file:
        file.write(base64.b64decode(reply.data[0].b64_json))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
