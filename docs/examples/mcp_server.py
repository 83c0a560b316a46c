"""A tool for chat clients that speak the Model Context Protocol: generate and edit pictures.

Register it with the chat client as the command: python mcp_server.py
Needs: pip install "mcp>=2" openai
"""

import base64
import os
from pathlib import Path

from mcp.server.mcpserver import Image, MCPServer
from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OVSERVE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
server = MCPServer("ovserve")


@server.tool()
def generate_image(prompt: str, seed: int = -1) -> Image:
    """Generate a picture from a description. The same seed gives the same picture."""
    reply = client.images.generate(prompt=prompt, extra_body={"seed": seed})
    return Image(data=base64.b64decode(reply.data[0].b64_json), format="png")


@server.tool()
def edit_image(path: str, prompt: str, strength: float = 0.7) -> Image:
    """Edit a picture file after a description of the result; strength 0 to 1 is how much may change."""
    with Path(path).open("rb") as image:
        reply = client.images.edit(image=image, prompt=prompt, extra_body={"strength": strength})
    return Image(data=base64.b64decode(reply.data[0].b64_json), format="png")


if __name__ == "__main__":
    server.run()
