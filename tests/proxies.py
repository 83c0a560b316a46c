"""Reverse proxies in front of a server on a local port: nginx, HAProxy, and Caddy as docs/install.md configures it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

__all__ = [
    "KINDS",
    "START_LIMIT_S",
    "example",
    "find_nginx_module",
    "find_program",
    "free_port",
    "run_balancer",
    "run_proxy",
]

KINDS = ["nginx", "nginx-unbuffered", "haproxy", "caddy"]
START_LIMIT_S = 20
_DEPLOY = Path(__file__).parents[1] / "scripts" / "deploy"
_DEPLOYED_PORTS = {"8080": 0, "8001": 1, "8002": 2}  # in the files there
_PAGE = Path(__file__).parents[1] / "docs" / "install.md"

_NGINX = """
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    client_max_body_size 256m;
    upstream ovserve {{ server 127.0.0.1:{upstream}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://ovserve; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_buffering off; proxy_request_buffering {buffering}; proxy_read_timeout 120s;
        }}
    }}
}}
"""

_HAPROXY = """
global
    maxconn 256
defaults
    mode http
    timeout connect 5s
    timeout client 120s
    timeout server 120s
    option http-keep-alive
    option abortonclose
    option http-no-delay
    http-reuse always
frontend f
    bind 127.0.0.1:{port}
    default_backend b
backend b
    option httpchk GET /v2/health/ready
    server s 127.0.0.1:{upstream} check inter 500ms
"""

# Without the lines for the certificate and the API key of the example.
_CADDY = """
{{
    admin off
    auto_https off
    storage file_system {folder}
}}
http://127.0.0.1:{port} {{
    {proxy}
}}
"""


def example(name: str) -> str:
    """Return the text of a marked block of docs/install.md."""
    found = re.search(
        rf"^ *<!-- example: {name} -->\n *```\w+\n(.*?)^ *```$", _PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found
    return found[1]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_program(name: str) -> str:
    """Return the path of a proxy's program."""
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, f"{name} is not installed: scripts/test extracts it"
    return program


def find_nginx_module(name: str) -> Path | None:
    """Return the file of a dynamic module of nginx: of the system, or beside the extracted nginx; None without it."""
    roots = [Path("/"), Path(find_program("nginx")).resolve().parents[1] / "root"]
    paths = (root / "usr/lib/nginx/modules" / f"ngx_{name}_module.so" for root in roots)
    return next((path for path in paths if path.exists()), None)


@contextmanager
def run_proxy(kind: str, folder: Path, upstream: int) -> Iterator[str]:
    """Run one of KINDS in front of the port `upstream`; yield its URL."""
    name, port, config = kind.partition("-")[0], free_port(), folder / "proxy.conf"
    program = find_program(name)
    if name == "haproxy":
        config.write_text(_HAPROXY.format(port=port, upstream=upstream))
        command = [program, "-db", "-f", str(config)]
    elif name == "caddy":
        proxy = re.search(r"reverse_proxy [^\n]*\{\n(?:.*\n)*?        \}\n", example("caddy"))
        assert proxy
        text = proxy[0].replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
        config.write_text(_CADDY.format(folder=folder, port=port, proxy=text))
        command = [program, "run", "--adapter", "caddyfile", "--config", str(config)]
    else:
        buffering = "off" if kind.endswith("unbuffered") else "on"
        user = "user root;" if os.getuid() == 0 else ""
        config.write_text(_NGINX.format(user=user, folder=folder, port=port, upstream=upstream, buffering=buffering))
        command = [program, "-c", str(config), "-e", str(folder / "error.log"), "-p", str(folder)]
    environment = {**os.environ, "HOME": str(folder)}  # Caddy writes there
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
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


@contextmanager
def run_balancer(kind: str, folder: Path, upstreams: Sequence[int]) -> Iterator[httpx.Client]:
    """Run `haproxy` or `nginx` as scripts/deploy configures it, before two ports; only ports and folders differ."""
    port = free_port()
    ports = [port, *upstreams]
    text = (_DEPLOY / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[kind]).read_text("utf-8")
    text = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[_DEPLOYED_PORTS[found[1]]]}", text)
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
