"""HAProxy and nginx pass connections on with the PROXY protocol: the server sees the client behind it, with TLS too."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.certificates import Pair, client_context, make_pair
from tests.live import LiveServer
from tests.proxies import START_LIMIT_S, find_nginx_module, find_program, free_port

CLIENT = "127.0.0.2"  # the proxy connects from 127.0.0.1
_HAPROXY = """
global
    maxconn 256
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend f
    bind 127.0.0.1:{port}
    default_backend b
backend b
    server s 127.0.0.1:{upstream} {how} check inter 200ms
"""


_NGINX = """
load_module {module};
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
stream {{ server {{ listen 127.0.0.1:{port}; proxy_pass 127.0.0.1:{upstream}; proxy_protocol on; }} }}
"""


@contextmanager
def proxy(folder: Path, upstream: int, how: str) -> Iterator[int]:
    """Run nginx, or HAProxy with these options of its server, as a proxy of TCP connections; yield its port."""
    port, config = free_port(), folder / "proxy.conf"
    if how == "nginx":
        module = find_nginx_module("stream")
        if module is None:
            pytest.skip("nginx has no module `stream` on this machine: scripts/test extracts it with nginx")
        user = "user root;" if os.getuid() == 0 else ""
        config.write_text(_NGINX.format(module=module, user=user, folder=folder, port=port, upstream=upstream))
        command = [find_program("nginx"), "-c", str(config), "-e", str(folder / "error.log"), "-p", str(folder)]
    else:
        config.write_text(_HAPROXY.format(port=port, upstream=upstream, how=how))
        command = [find_program("haproxy"), "-db", "-f", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until
        yield port
    finally:
        process.terminate()
        process.wait(START_LIMIT_S)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "used")


@pytest.fixture(scope="module")
def proxied(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    options = ["--tls_certificate", str(pair.certificate), "--tls_key", str(pair.key)]
    with LiveServer("--trusted_proxies", "127.0.0.1", "--proxy_protocol", "true", *options) as server:
        yield server


@pytest.mark.parametrize(
    "how", ["nginx", "send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"]
)
def test_log_and_limits_see_the_client(proxied: LiveServer, pair: Pair, tmp_path: Path, how: str) -> None:
    transport = httpx.HTTPTransport(verify=client_context(pair), local_address=CLIENT)
    with proxy(tmp_path, proxied.port, how) as port, httpx.Client(transport=transport, timeout=60) as client:
        request = {"prompt": "a red star", "size": "64x64", "steps": 1}
        reply = client.post(f"https://localhost:{port}/v1/images/generations", json=request)
        assert reply.status_code == 200, reply.text
        identifier, until = reply.headers["x-request-id"], time.monotonic() + 30
        while not (line := next((each for each in list(proxied.log) if f"id={identifier}" in each), "")):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert f"address={CLIENT} " in line, line
