"""Peer: LitServe around GenAI, with one model in each of its worker processes."""

import argparse
from typing import Any

import litserve
from fastapi import Request

from benchmarks.peers.work import Pipelines

FILES = ("image", "mask")


class Edits(litserve.LitAPI):
    """One edit per call, because GenAI takes one picture at a time."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__(api_path="/v3/images/edits")
        self.model, self.threads = model, threads

    def setup(self, device: str) -> None:
        """Load the model. Runs in: worker."""
        self.pipelines = Pipelines(self.model, threads=self.threads)

    # LitServe reads this annotation at run time, and would validate the request against anything but the class Request.
    def decode_request(self, request: Request) -> tuple[dict[str, bytes], dict[str, str]]:
        """Split the form, which LitServe has parsed into memory, into files and fields."""
        files = {name: request[name].file.read() for name in FILES if name in request}
        return files, {name: str(value) for name, value in request.items() if name not in FILES}

    def predict(self, x: tuple[dict[str, bytes], dict[str, str]]) -> dict[str, Any]:
        """Make the edit."""
        files, fields = x
        return self.pipelines.answer(files["image"], files.get("mask"), fields)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the output unchanged; it is the reply."""
        return output


def main() -> None:
    """Start server and workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="worker processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference; 0: the plugin's default")
    options = parser.parse_args()
    server = litserve.LitServer(
        Edits(options.model, options.threads), accelerator="cpu", workers_per_device=options.workers, timeout=600
    )
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
