"""Streams, as the official client parses them and as bytes."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ovserve.api.images import PROXY_HEAD_WAIT_S
from tests.live import LiveServer
from tests.reader import read_picture

PROMPT = "a green circle on a blue background"


def pixels(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_edit_streams_previews_and_the_picture(server: LiveServer, data: Path) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        (data / "red_circle.png").open("rb") as image,
    ):
        stream = client.images.edit(
            image=image, prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 4, "strength": 1.0}
        )
        events = list(stream)
        image.seek(0)
        whole = client.images.edit(image=image, prompt=PROMPT, extra_body={"seed": 4, "strength": 1.0})
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_edit.completed"
    assert kinds[:-1] == ["image_edit.partial_image"] * 3
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    final: Any = events[-1]
    assert final.b64_json == whole.data[0].b64_json
    assert (final.size, final.quality, final.background, final.output_format) == ("256x256", "high", "opaque", "png")
    assert final.usage.total_tokens > 0
    last: Any = events[-2]
    assert read_picture(pixels(last.b64_json)).background == read_picture(pixels(final.b64_json)).background


def test_generation_streams_one_final_event_for_each_picture(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        events = list(client.images.generate(prompt="a red star on a black background", stream=True, n=2))
        whole = client.images.generate(prompt="a red star on a black background", n=2).usage
    assert whole is not None
    # The usage of the events adds up to the usage of the request.
    assert (
        sum(event.usage.total_tokens for event in events if event.type == "image_generation.completed")
        == whole.total_tokens
    )
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert len({event.b64_json for event in events}) == 2


def test_bytes_of_a_stream(server: LiveServer, data: Path) -> None:
    files = {"image": ("a.png", (data / "red_circle.png").read_bytes(), "image/png")}
    fields = {"prompt": PROMPT, "stream": "True", "partial_images": "1"}
    with httpx.stream("POST", f"{server.url}/v1/images/edits", data=fields, files=files, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-request-id"]
        text = reply.read().decode()
    assert text.endswith("\n\n")
    blocks = text.rstrip("\n").split("\n\n")
    comments = [block for block in blocks if block.startswith(":")]
    events = [block for block in blocks if not block.startswith(":")]
    assert any("step" in comment for comment in comments)
    for block in events:
        first, second = block.split("\n")
        document = json.loads(second.removeprefix("data: "))
        assert first == f"event: {document['type']}"
        assert {"b64_json", "created_at", "picture_index", "size", "quality", "background", "output_format"} <= set(
            document
        )
        assert ("partial_image_index" in document) is document["type"].endswith("partial_image")
        assert ("usage" in document) is document["type"].endswith("completed")


@pytest.mark.parametrize("field", ["X-Forwarded-For: 192.0.2.1", "Forwarded: for=192.0.2.1", "Via: 1.1 caddy"])
def test_stream_through_a_proxy_begins_when_the_proxy_has_sent_the_body(server: LiveServer, field: str) -> None:
    """Caddy and Traefik end a stream whose head arrives before they have noted that the body is sent."""
    document = json.dumps({"prompt": "a star", "num_inference_steps": 2, "stream": True}).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n{field}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(document)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + document[:-1])
        sent_at = time.monotonic()
        connection.sendall(document[-1:])
        received = connection.recv(65536)
        waited_s = time.monotonic() - sent_at
        while chunk := connection.recv(65536):
            received += chunk
    assert waited_s >= PROXY_HEAD_WAIT_S
    assert b"event: image_generation.completed" in received


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"stream": "true", "n": "0"}, True, "n"),
        ({"stream": "true", "prompt": "red " * 60, "truncate_prompt": "false"}, True, "prompt"),
        ({"stream": "true"}, False, "image"),
    ],
)
def test_error_before_the_first_byte_is_a_plain_http_error(
    server: LiveServer, data: Path, fields: dict[str, str], files: bool, param: str
) -> None:
    image = (data / "red_circle.png").read_bytes() if files else (data / "red_circle.png").read_bytes()[:300]
    reply = httpx.post(
        f"{server.url}/v1/images/edits",
        data={"prompt": PROMPT, **fields},
        files={"image": ("a.png", image)},
        timeout=60,
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_later_error_is_an_error_event(server: LiveServer) -> None:
    document = {"prompt": "a star", "stream": True, "num_inference_steps": 100, "n": 10, "timeout_s": 0.6}
    reply = httpx.post(f"{server.url}/v1/images/generations", json=document, timeout=60)
    assert reply.status_code == 200
    last = reply.text.rstrip("\n").split("\n\n")[-1]
    assert last.startswith("event: error\n")
    error = json.loads(last.partition("data: ")[2])
    assert error["type"] == "error"
    assert error["error"]["code"] == "deadline_exceeded"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="deadline"),
    ):
        list(
            client.images.generate(
                prompt="a star", n=10, stream=True, extra_body={"num_inference_steps": 100, "timeout_s": 0.6}
            )
        )


def test_deadline_of_a_json_reply_is_504_and_not_retried(server: LiveServer) -> None:
    document = {"prompt": "a star", "num_inference_steps": 100, "n": 10}
    reply = httpx.post(f"{server.url}/v1/images/generations", json=document, headers={"x-timeout-s": "0.4"}, timeout=60)
    assert reply.status_code == 504
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_of_the_client_stops_its_job(server: LiveServer, stream: bool) -> None:
    document = json.dumps({"prompt": "a star", "num_inference_steps": 100, "n": 10, "stream": stream}).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        f"{len(document)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + document)
        while not server.fetch("/v3/models/ovserve-builtin")[1]["running"]:
            pass
    while server.fetch("/v3/models/ovserve-builtin")[1]["running"]:
        pass  # fails by the test's timeout: ten pictures of 100 steps take far longer
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'ovserve_jobs_total{model="ovserve-builtin",state="cancelled"}' in metrics
