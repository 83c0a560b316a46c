"""Several front ends behind HAProxy and nginx as scripts/deploy configures them, with one directory of pictures."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faultserver import FaultServer, picture_of
from tests.proxies import START_LIMIT_S, find_program, free_port

DEPLOY = Path(__file__).parents[2] / "scripts" / "deploy"
ORIGINAL = {"8080": 0, "8001": 1, "8002": 2}  # ports in the committed files


@contextmanager
def balancer(kind: str, folder: Path, servers: list[FaultServer]) -> Iterator[httpx.Client]:
    """Run a balancer with its committed configuration; only ports and folders are changed."""
    port = free_port()
    ports = [port, *(server.port for server in servers)]
    text = (DEPLOY / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[kind]).read_text("utf-8")
    text = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[ORIGINAL[found[1]]]}", text)
    config = folder / "balancer.conf"
    if kind == "nginx":
        user = "user root;" if os.getuid() == 0 else ""
        paths = "".join(
            f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = f"{user} daemon off; pid {folder}/nginx.pid;\n" + text.replace("http {", f"http {{ {paths}")
        command = [find_program(kind), "-c", str(config), "-e", str(folder / "error.log"), "-p", str(folder)]
    else:
        command = [find_program(kind), "-db", "-f", str(config)]
    config.write_text(text)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + START_LIMIT_S
            while not _is_ready(client):
                assert process.poll() is None, text
                assert time.monotonic() < deadline
            yield client
    finally:
        process.terminate()
        process.wait(START_LIMIT_S)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_pictures_of_each_front_end_are_found_through_any(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = []
        for name in ("a", "b"):
            spool = tmp_path / name
            spool.mkdir()
            options = ("--store_dir", str(tmp_path / "store"), "--trusted_proxies", "127.0.0.1")
            servers.append(stack.enter_context(FaultServer(spool, *options)))
        client = stack.enter_context(balancer(kind, tmp_path, servers))
        urls = []
        for server in servers:
            body = {"prompt": "echo kept", "seed": 5, "response_format": "url"}
            urls.append(
                httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()["data"][0]["url"]
            )
        for _ in range(4):
            for url in urls:
                found = client.get(httpx.URL(url).path)
                assert found.status_code == 200
                assert found.content.startswith(b"echo kept")
        for number in range(8):
            reply = client.post("/v1/images/generations", json={"prompt": "echo x", "seed": number})
            assert picture_of(reply).startswith(b"echo x")
        done = [server.logged("POST /v1/images/generations 200") for server in servers]
        assert all(len(lines) > 1 for lines in done), "one front end has served everything"
        servers[0].stop()
        for _ in range(8):
            assert picture_of(client.post("/v1/images/generations", json={"prompt": "echo y"})).startswith(b"echo y")
        assert client.get(httpx.URL(urls[0]).path).content.startswith(b"echo kept"), "found by the other one"
