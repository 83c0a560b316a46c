"""The server behind nginx and HAProxy: persistent connections, large uploads, streams, errors, disconnects."""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from tests.live import LiveServer

PROMPT = "a green circle on a blue background"
START_LIMIT_S = 20

NGINX = """
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    client_max_body_size 100m;
    upstream ovserve {{ server 127.0.0.1:{upstream}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://ovserve; proxy_http_version 1.1;
            proxy_set_header Connection ""; proxy_set_header Host $http_host;
            proxy_buffering off; proxy_request_buffering {buffering}; proxy_read_timeout 120s;
        }}
    }}
}}
"""

HAPROXY = """
global
    maxconn 256
defaults
    mode http
    timeout connect 5s
    timeout client 120s
    timeout server 120s
    option http-keep-alive
    http-reuse always
frontend f
    bind 127.0.0.1:{port}
    default_backend b
backend b
    option httpchk GET /v2/health/ready
    server s 127.0.0.1:{upstream} check inter 500ms
"""


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=["nginx", "nginx-unbuffered", "haproxy"])
def proxied(
    request: pytest.FixtureRequest, server: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Start a proxy in front of the live server; yield the proxy's URL."""
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    program = shutil.which(request.param.partition("-")[0], path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, f"{request.param} is not installed: scripts/test installs it"
    config = folder / "proxy.conf"
    if request.param == "haproxy":
        config.write_text(HAPROXY.format(port=port, upstream=server.port))
        command = [program, "-db", "-f", str(config)]
    else:
        buffering = "off" if request.param.endswith("unbuffered") else "on"
        config.write_text(
            NGINX.format(
                user="user root;" if os.getuid() == 0 else "",
                folder=folder,
                port=port,
                upstream=server.port,
                buffering=buffering,
            )
        )
        command = [program, "-c", str(config), "-e", str(folder / "error.log"), "-p", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
            assert time.monotonic() < deadline
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_LIMIT_S)


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
