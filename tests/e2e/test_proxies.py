"""The server behind nginx, HAProxy and Caddy: persistent connections, large uploads, streams, errors, disconnects."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from tests.live import LiveServer
from tests.proxies import KINDS, run_proxy

PROMPT = "a green circle on a blue background"


@pytest.fixture(scope="module", params=KINDS)
def proxied(
    request: pytest.FixtureRequest, server: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Start a proxy in front of the live server; yield the proxy's URL."""
    with run_proxy(request.param, tmp_path_factory.mktemp(request.param), server.port) as url:
        yield url


def test_edits_are_served_over_persistent_connections(proxied: str, data: Path) -> None:
    image = (data / "red_circle.png").read_bytes()
    with httpx.Client(base_url=proxied, timeout=60) as client:
        replies = [
            client.post("/v1/images/edits", data={"prompt": PROMPT, "seed": "1"}, files={"image": ("a.png", image)})
            for _ in range(5)
        ]
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.json()["data"][0]["b64_json"] for reply in replies}) == 1
    assert len({reply.headers["x-request-id"] for reply in replies}) == 5


def test_streams_pass_through(proxied: str, data: Path) -> None:
    with (
        openai.OpenAI(base_url=f"{proxied}/v1", api_key="none", max_retries=0) as client,
        (data / "red_circle.png").open("rb") as image,
    ):
        events = [event.type for event in client.images.edit(image=image, prompt=PROMPT, stream=True)]
    assert events[-1] == "image_edit.completed"


@pytest.mark.parametrize("chunked", [False, True])
def test_large_upload_is_served(proxied: str, chunked: bool) -> None:
    stream = io.BytesIO()
    noise = Image.frombytes("RGB", (2000, 1600), random.Random(1).randbytes(2000 * 1600 * 3))
    noise.save(stream, "PNG", compress_level=0)
    assert stream.tell() > 9_000_000
    boundary = "b0undary"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{PROMPT}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="size"\r\n\r\n128x128\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="n.png"\r\n\r\n'
    ).encode() + stream.getvalue() + f"\r\n--{boundary}--\r\n".encode()  # fmt: skip
    pieces = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    reply = httpx.post(f"{proxied}/v1/images/edits", content=pieces if chunked else body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text[:300]
    assert reply.json()["size"] == "128x128"


def test_error_in_the_middle_of_an_upload_reaches_the_client(proxied: str) -> None:
    body = b'--b\r\nContent-Disposition: form-data; nome="image"\r\n\r\n' + b"x" * 3_000_000 + b"\r\n--b--\r\n"
    reply = httpx.post(
        f"{proxied}/v1/images/edits",
        content=body,
        headers={"content-type": "multipart/form-data; boundary=b"},
        timeout=60,
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_errors_and_header_fields_pass_through(proxied: str) -> None:
    with httpx.Client(base_url=proxied, timeout=60) as client:
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert client.head("/v1/models").status_code == 200
        assert client.get("/v1/images/edits").headers["allow"] == "OPTIONS, POST"
        assert client.get("/v1/models").json()["data"][0]["id"] == "ovserve-builtin"


def test_disconnect_from_the_proxy_cancels_the_job(proxied: str, server: LiveServer) -> None:
    document = {"prompt": "a star", "num_inference_steps": 100, "n": 10, "stream": True}
    with httpx.stream("POST", f"{proxied}/v1/images/generations", json=document, timeout=60) as reply:
        next(reply.iter_bytes())
    deadline = time.monotonic() + 30
    while server.fetch("/v3/models/ovserve-builtin")[1]["running"]:
        assert time.monotonic() < deadline
