"""Peer: FastAPI and uvicorn around GenAI, with one lock around the pipeline: the simplest server a user would write."""

from __future__ import annotations

import argparse
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from benchmarks.peers.work import Pipelines

FILES = ("image", "mask")


def make_app(pipelines: Pipelines) -> FastAPI:
    """Return the application."""
    app = FastAPI()
    lock = threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    def run(files: dict[str, bytes], fields: dict[str, str]) -> dict[str, Any]:
        with lock:
            return pipelines.answer(files["image"], files.get("mask"), fields)

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
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(make_app(Pipelines(options.model)), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
