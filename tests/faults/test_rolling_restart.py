"""Two instances behind a proxy, configured as docs/install.md says, restarted in turn under load: nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faultserver import TINY_PNG, FaultServer
from tests.proxies import START_LIMIT_S, example, find_program, free_port

CLIENTS = 4
LARGE_PNG = TINY_PNG + b"\0" * 40_000  # more than HAProxy can repeat

_NGINX = """
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    {upstream}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://ovserve; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $http_host; proxy_buffering off;
            {retries}
        }}
    }}
}}
"""


def configuration(kind: str, folder: Path, port: int, upstreams: list[int]) -> tuple[str, list[str]]:
    """Return the text of the configuration and the command of a proxy in front of two instances."""
    program, config = find_program(kind), str(folder / "proxy.conf")
    if kind == "haproxy":
        text = example("haproxy").replace("127.0.0.1:8080", f"127.0.0.1:{port}")
        command = [program, "-db", "-f", config]
    else:
        user = "user root;" if os.getuid() == 0 else ""
        parts = {"upstream": example("nginx-upstream"), "retries": example("nginx-retries")}
        text = _NGINX.format(user=user, folder=folder, port=port, **parts)
        command = [program, "-c", config, "-e", str(folder / "error.log"), "-p", str(folder)]
    for number, upstream in enumerate(upstreams):
        text = text.replace(f"127.0.0.1:800{number}", f"127.0.0.1:{upstream}")
    return text, command


@contextmanager
def proxy(kind: str, folder: Path, upstreams: list[int]) -> Iterator[str]:
    """Run a proxy in front of two instances; yield its URL."""
    port = free_port()
    text, command = configuration(kind, folder, port, upstreams)
    (folder / "proxy.conf").write_text(text)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_LIMIT_S)


def instance(folder: Path, port: int, delay_s: int) -> FaultServer:
    """Start an instance at a port."""
    options = ("--port", str(port), "--shutdown_delay_s", str(delay_s), "--queue_limit", "64")
    return FaultServer(folder / str(port), *options)


# nginx has no health checks, so the delay does not help there: its retries alone have to suffice.
@pytest.mark.parametrize(("kind", "delay_s"), [("nginx", 0), pytest.param("haproxy", 3, marks=pytest.mark.heavy)])
def test_restarts_in_turn_lose_no_request(tmp_path: Path, kind: str, delay_s: int) -> None:
    ports = [free_port(), free_port()]
    outcomes: Counter[object] = Counter()
    finished = threading.Event()

    def ask(url: str, image: bytes) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not finished.is_set():
                files = {"image": ("a.png", image)}
                try:
                    reply = client.post("/v1/images/edits", data={"prompt": "sleep 0.02"}, files=files)
                    outcomes[reply.status_code] += 1
                except httpx.TransportError as error:
                    outcomes[repr(error)] += 1

    with instance(tmp_path, ports[0], delay_s) as first, instance(tmp_path, ports[1], delay_s) as second:  # noqa: SIM117 - one line would be too long
        with proxy(kind, tmp_path, ports) as url:
            images = [TINY_PNG, LARGE_PNG] * (CLIENTS // 2)
            threads = [threading.Thread(target=ask, args=(url, image)) for image in images]
            for thread in threads:
                thread.start()
            first.signal(signal.SIGTERM)
            assert first.wait() == 0
            with instance(tmp_path, ports[0], delay_s):
                time.sleep(1.5)  # for a health check of the proxy
                second.signal(signal.SIGTERM)
                assert second.wait() == 0
                with instance(tmp_path, ports[1], delay_s):
                    time.sleep(1.5)
                    finished.set()
                    for thread in threads:
                        thread.join()
    assert outcomes.keys() == {200}, outcomes
    assert outcomes[200] > 100  # 600 to 900 on two cores
