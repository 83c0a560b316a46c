"""Give every product photo in a folder a new background; the product itself stays as it is.

    python product_backgrounds.py PHOTOS OUTPUT "on a green background"

Each photo needs a transparent background, as background removers write it: transparent pixels are repainted, opaque
ones come back bit for bit. Needs: pip install openai
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OVSERVE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")


def main(photos: Path, output: Path, background: str) -> None:
    """Edit each photo; write it under its own name."""
    output.mkdir(exist_ok=True)
    for photo in sorted(photos.glob("*.png")):
        with photo.open("rb") as image:
            reply = client.images.edit(image=image, prompt=f"a product {background}", extra_body={"mask_blur": 2})
        (output / photo.name).write_bytes(base64.b64decode(reply.data[0].b64_json))
        print(photo.name, "seed", reply.data[0].seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
