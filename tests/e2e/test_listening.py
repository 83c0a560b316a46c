"""Where the server listens: several addresses, Unix sockets, TLS, and sockets from systemd; with the real program."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.certificates import client_context, make_pair
from tests.live import LiveServer

ROOT = Path(__file__).parents[2]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


def ready_urls(server: LiveServer, count: int) -> list[str]:
    """Wait for this many ready lines, one for each address; return the addresses."""
    until = time.monotonic() + 30
    while True:
        found = [line.removeprefix("ready ") for line in list(server.lines) if line.startswith("ready ")]
        if len(found) >= count:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.01)


def status_at(path: Path, target: str = "/v2/health/ready") -> int:
    """Return the status of a GET over a Unix socket."""
    client = UnixConnection(path)
    try:
        client.request("GET", target)
        return client.getresponse().status
    finally:
        client.close()


def test_tls_beside_a_unix_socket_and_plain_loopback(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "http.sock"
    pair, renewed = make_pair(tmp_path, "used"), make_pair(tmp_path, "renewed")
    listen = f"127.0.0.1:0,http://127.0.0.2:0,unix:{path}"
    options = ["--tls_certificate", str(pair.certificate), "--tls_key", str(pair.key), "--socket_mode", "660"]
    with LiveServer("--listen", listen, *options) as server:
        secure, plain, unix = ready_urls(server, 3)
        assert secure.startswith("https://127.0.0.1:")
        assert plain.startswith("http://127.0.0.2:")
        assert unix == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert status_at(path) == 200
        assert httpx.get(f"{plain}/health").status_code == 200
        context = client_context(pair)
        context.load_verify_locations(renewed.certificate)
        with httpx.Client(verify=context, base_url=secure, timeout=60) as client:
            picture = {"image": ("a.png", (data / "mask_white.png").read_bytes(), "image/png")}
            fields = {"prompt": "a", "size": "64x64", "response_format": "url", "num_inference_steps": "2"}
            reply = client.post("/v1/images/edits", data=fields, files=picture)
            assert reply.status_code == 200, reply.text
            address = reply.json()["data"][0]["url"]
            assert address.startswith("https://127.0.0.1:")
            assert client.get(address).content.startswith(b"\x89PNG")
            sdk = openai.OpenAI(api_key="none", base_url=f"{secure}/v1", http_client=client)
            image = io.BytesIO((data / "mask_white.png").read_bytes())
            image.name = "a.png"
            assert sdk.images.edit(model="ovserve-builtin", image=image, prompt="a", size="auto").data
        # SIGHUP reads the certificate again.
        pair.replace(renewed)
        server.signal(signal.SIGHUP)
        until = time.monotonic() + 30
        while presented(secure, context) != "renewed":
            assert time.monotonic() < until
        if shutil.which("curl"):
            for target in (["--unix-socket", str(path), "http://any/health"],
                           ["--cacert", str(pair.certificate), f"{secure}/health"]):  # fmt: skip
                asked = subprocess.run(["curl", "-sSf", *target], capture_output=True, timeout=30, check=False)
                assert asked.returncode == 0, asked.stderr
    assert server.wait() == 0
    assert not path.exists()


def presented(url: str, context: object) -> str:
    """Return the name in the certificate of a server."""
    target = httpx.URL(url)
    with (
        socket.create_connection((target.host, target.port), 10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as client,  # type: ignore[attr-defined]
    ):
        return dict(part[0] for part in client.getpeercert()["subject"])["commonName"]


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd-socket-activate is not installed")
def test_sockets_from_systemd_answer_503_until_a_model_is_ready(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "http.sock"
    activate = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-l", str(path), sys.executable, "-m", "ovserve"]
    with LiveServer(program=activate, wait_ready=False) as server:
        until = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < until
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            first = client.post("/v1/images/generations", json={"prompt": "a"})
            assert first.status_code == 503, first.text
            assert 1 <= int(first.headers["retry-after"]) <= 60
            server.await_ready()
            assert client.get("/v2/health/ready").status_code == 200
        assert status_at(path) == 200
        assert ready_urls(server, 2) == [f"http://127.0.0.1:{port}", f"unix:{path}"]
        # The sockets belong to systemd: the file stays.
    assert path.exists()


def test_socket_unit_is_valid(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for name in ("ovserve.socket", "ovserve.service"):
        text = (ROOT / "scripts" / name).read_text("utf-8").replace("/opt/ovserve/bin/python", "/bin/true")
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "ovserve.socket")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ovserve" not in done.stderr, done.stderr


def test_wrong_places_are_named(tmp_path: Path) -> None:
    for options, message in (
        (["--listen", "nowhere"], "listen: 'nowhere': expected an address with a port"),
        (["--listen", "https://127.0.0.1:0"], "needs the option tls_certificate"),
        (["--listen", "127.0.0.1:1,127.0.0.1:1"], "listen: an address is given twice"),
        (["--socket_mode", "999"], "socket_mode=999: expected three octal digits"),
        (["--proxy_protocol", "true"], "proxy_protocol has no effect without trusted_proxies"),
        (["--tls_key", "x"], "tls_key has no effect without tls_certificate"),
        (["--tls_certificate", str(tmp_path / "none.pem")], "none.pem: No such file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ovserve", "check", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, json.dumps(done.stdout)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
