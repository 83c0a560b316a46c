"""Peer: mosec around GenAI, a Rust front end with Python worker processes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from mosec import Runtime, Server, ValidationError, Worker
from python_multipart.multipart import MultipartParser, parse_options_header

from benchmarks.peers.work import Pipelines

FILES = ("image", "mask")


class Edits(Worker):
    """One edit per call. A worker receives no header, so it reads the boundary from the first line of the body."""

    def __init__(self) -> None:
        self.pipelines = Pipelines(os.environ["PEER_MODEL"], threads=int(os.environ["PEER_THREADS"]))

    def deserialize(self, data: bytes) -> dict[str, bytes]:
        """Parse the form.

        Raises:
            ValidationError: prompt or image is missing.
        """
        parts = parse_form(bytes(data))
        if "prompt" not in parts or "image" not in parts:
            raise ValidationError("prompt and image are required")
        return parts

    def forward(self, data: dict[str, bytes]) -> dict[str, Any]:
        """Make the edit."""
        fields = {name: value.decode() for name, value in data.items() if name not in FILES}
        return self.pipelines.answer(data["image"], data.get("mask"), fields)

    def serialize(self, data: dict[str, Any]) -> bytes:
        """Encode the reply as JSON."""
        return json.dumps(data).encode()


def parse_form(body: bytes) -> dict[str, bytes]:
    """Parse a multipart body into names and contents."""
    parts: dict[str, bytes] = {}
    head = {"field": b"", "value": b""}
    part: dict[str, Any] = {}

    def end_of_line() -> None:
        part["lines"][head["field"].lower()] = head["value"]
        head.update(field=b"", value=b"")

    def end_of_part() -> None:
        _, options = parse_options_header(part["lines"][b"content-disposition"])
        parts[options[b"name"].decode()] = b"".join(part["data"])

    parser = MultipartParser(
        body[2 : body.index(b"\r\n")],
        {
            "on_part_begin": lambda: part.update(lines={}, data=[]),
            "on_header_field": lambda data, start, end: head.update(field=head["field"] + data[start:end]),
            "on_header_value": lambda data, start, end: head.update(value=head["value"] + data[start:end]),
            "on_header_end": end_of_line,
            "on_part_data": lambda data, start, end: part["data"].append(data[start:end]),
            "on_part_end": end_of_part,
        },
    )
    parser.write(body)
    parser.finalize()
    return parts


def main() -> None:
    """Start server and workers; mosec reads its own settings from the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="worker processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference; 0: the plugin's default")
    options = parser.parse_args()
    os.environ |= {
        "PEER_MODEL": options.model,
        "PEER_THREADS": str(options.threads),
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": str(options.port),
        "MOSEC_TIMEOUT": "600000",  # milliseconds
    }
    del sys.argv[1:]
    server = Server()
    server.register_runtime({"/v3/images/edits": [Runtime(Edits, num=options.workers, timeout=600)]})
    server.run()


if __name__ == "__main__":
    main()
