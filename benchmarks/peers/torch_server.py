"""Peer: the pipelines of optimum-intel or diffusers behind FastAPI, the libraries for users without GenAI.

`--library optimum` reads an OpenVINO directory; `--library diffusers` reads a diffusers directory and runs it with
torch on the CPU.
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from benchmarks.peers.work import encode_reply, read_mask, read_picture

FILES = ("image", "mask")


def load(library: str, model: str) -> tuple[Any, Any]:
    """Load the image-to-image and inpainting pipelines; there is no inpainting with optimum."""
    if library == "optimum":
        from optimum.intel import OVPipelineForImage2Image

        image2image = OVPipelineForImage2Image.from_pretrained(model, device="CPU", local_files_only=True)
        inpainting = None
    else:
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        image2image = AutoPipelineForImage2Image.from_pretrained(
            model, torch_dtype=torch.bfloat16, local_files_only=True
        )
        inpainting = AutoPipelineForInpainting.from_pipe(image2image)
    for pipeline in filter(None, (image2image, inpainting)):
        pipeline.set_progress_bar_config(disable=True)
    return image2image, inpainting


def make_app(image2image: Any, inpainting: Any) -> FastAPI:
    """Return the application."""
    app = FastAPI()
    lock = threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    def run(files: dict[str, bytes], fields: dict[str, str]) -> dict[str, Any]:
        image = read_picture(files["image"], fields.get("size", ""))
        options = {
            "prompt": fields["prompt"],
            "image": image,
            "num_inference_steps": int(fields.get("num_inference_steps", 20)),
            "guidance_scale": float(fields.get("guidance_scale", 7.5)),
            "strength": float(fields.get("strength", 0.8)),
            "num_images_per_prompt": int(fields.get("n", 1)),
            "generator": torch.Generator("cpu").manual_seed(int(fields.get("seed", 0))),
        }
        with lock, torch.inference_mode():
            if "mask" in files:
                area = read_mask(files["mask"], image.size)
                images = inpainting(mask_image=area, width=image.width, height=image.height, **options).images
            else:
                images = image2image(**options).images
        return encode_reply(images)

    @app.post("/v3/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        async with request.form() as form:
            files = {name: await form[name].read() for name in FILES if name in form}
            fields = {name: str(value) for name, value in form.items() if name not in FILES}
        return await run_in_threadpool(run, files, fields)

    return app


def main() -> None:
    """Load the model, then listen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=("optimum", "diffusers"), required=True)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = make_app(*load(options.library, options.model))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
