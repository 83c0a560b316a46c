"""A web app with a mask editor in 30 lines.

Needs: pip install gradio openai pillow
"""

import base64
import io
import os

import gradio
from openai import OpenAI
from PIL import Image

client = OpenAI(base_url=os.environ.get("OVSERVE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")


def edit(drawing: dict, prompt: str, strength: float) -> Image.Image:
    """Edit the picture; paint on the layer selects the part to repaint."""
    picture, mask = io.BytesIO(), io.BytesIO()
    drawing["background"].convert("RGB").save(picture, "PNG")
    painted = drawing["layers"][0].getchannel("A") if drawing["layers"] else None
    files = {"image": ("picture.png", picture.getvalue())}
    if painted is not None and painted.getbbox():
        painted.save(mask, "PNG")
        files["mask"] = ("mask.png", mask.getvalue())
    reply = client.images.edit(**files, prompt=prompt, extra_body={"strength": strength, "mask_mode": "luminance"})
    return Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json)))


app = gradio.Interface(
    edit,
    [gradio.ImageEditor(type="pil"), gradio.Textbox(label="Prompt"), gradio.Slider(0.05, 1, 0.7, label="Strength")],
    gradio.Image(type="pil", format="png"),
)

if __name__ == "__main__":
    app.launch(server_name="127.0.0.1")
