"""Peer: stable-diffusion.cpp's Python package behind FastAPI."""

from __future__ import annotations

import argparse
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from stable_diffusion_cpp import StableDiffusion

from benchmarks.peers.work import encode_reply, read_mask, read_picture

FILES = ("image", "mask")


def make_app(engine: StableDiffusion) -> FastAPI:
    """Return the application."""
    app = FastAPI()
    lock = threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    def run(files: dict[str, bytes], fields: dict[str, str]) -> dict[str, Any]:
        image = read_picture(files["image"], fields.get("size", ""))
        options: dict[str, Any] = {}
        if "mask" in files:
            options["mask_image"] = read_mask(files["mask"], image.size).convert("L")
        with lock:
            images = engine.generate_image(
                prompt=fields["prompt"],
                init_image=image,
                width=image.width,
                height=image.height,
                sample_steps=int(fields.get("num_inference_steps", 20)),
                cfg_scale=float(fields.get("guidance_scale", 7.5)),
                strength=float(fields.get("strength", 0.8)),
                seed=int(fields.get("seed", 0)),
                batch_count=int(fields.get("n", 1)),
                **options,
            )
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
    parser.add_argument("--model", required=True, help="model directory, in the diffusers layout")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--weights", default="f16", help="type of the weights (%(default)s)")
    options = parser.parse_args()
    engine = StableDiffusion(model_path=options.model, wtype=options.weights, verbose=False)
    uvicorn.run(make_app(engine), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
