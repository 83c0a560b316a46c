"""The examples of docs/install.md: the proxy configurations before a live server, the settings, the container."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from ovserve.settings.sources import load_settings
from tests.live import LiveServer
from tests.proxies import START_LIMIT_S, example, find_program, free_port

ROOT = Path(__file__).parents[2]
HOST = "images.example.org"
KEY = "change-me"
# The main configuration file, around the server block of the page.
NGINX_CONF = """
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/ovserve.conf;
}}
"""


# The site's address, and the options that a site on the internet has by default.
CADDYFILE = """
{{
    admin off
    auto_https disable_redirects
    skip_install_trust
    storage file_system {folder}
}}
{example}
"""


@pytest.fixture(scope="module")
def published() -> Iterator[LiveServer]:
    """Start a server as the page says: on loopback, without keys, and with its public address."""
    with LiveServer("--public_url", f"https://{HOST}") as server:
        yield server


@pytest.fixture(scope="module")
def behind_caddy_tls(
    published: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Start Caddy with the configuration of the page, and a certificate of its own authority; yield as below."""
    folder, port = tmp_path_factory.mktemp("caddy"), free_port()
    text = example("caddy").replace("127.0.0.1:8000", f"127.0.0.1:{published.port}")
    text = text.replace(f"{HOST} {{", f"https://{HOST}:{port} {{\n    bind 127.0.0.1\n    tls internal", 1)
    (folder / "Caddyfile").write_text(CADDYFILE.format(folder=folder, example=text))
    command = [find_program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    root = folder / "pki" / "authorities" / "local" / "root.crt"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not (root.exists() and is_serving(f"https://127.0.0.1:{port}", root)):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=str(root))
    finally:
        process.terminate()
        process.wait(START_LIMIT_S)


def is_serving(url: str, root: Path) -> bool:
    """Return whether the site answers with a certificate that this authority has signed."""
    try:
        trust = ssl.create_default_context(cafile=str(root))
        with httpx.Client(verify=trust) as client:
            return client.get(url, headers={"host": HOST}, extensions={"sni_hostname": HOST}).status_code > 0
    except (httpx.TransportError, ssl.SSLError):  # the file exists some time before its certificate is in it
        return False


@pytest.fixture(params=["behind_nginx", "behind_caddy_tls"])
def behind_proxy(request: pytest.FixtureRequest) -> tuple[str, ssl.SSLContext]:
    """Return the URL of each proxy of the page, and an SSL context that trusts it."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def behind_nginx(
    published: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Start nginx with the configuration of the page; only addresses and paths are replaced.

    Yields its URL, and an SSL context that trusts its certificate.
    """
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    certificate, key = folder / "fullchain.pem", folder / "privkey.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    make += ["-addext", f"subjectAltName=DNS:{HOST},IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    text = example("nginx").replace(f"/etc/ssl/{HOST}", str(folder)).replace("listen 443", f"listen 127.0.0.1:{port}")
    (folder / "ovserve.conf").write_text(text.replace("127.0.0.1:8000", f"127.0.0.1:{published.port}"))
    (folder / "nginx.conf").write_text(NGINX_CONF.format(folder=folder, user="user root;" if os.getuid() == 0 else ""))
    command = [
        find_program("nginx"),
        "-c",
        str(folder / "nginx.conf"),
        "-e",
        str(folder / "error.log"),
        "-p",
        str(folder),
    ]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trust = ssl.create_default_context(cafile=str(certificate))
    try:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=60) as client:
            deadline = time.monotonic() + START_LIMIT_S
            while True:
                try:
                    client.get("/")
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
        yield f"https://127.0.0.1:{port}", trust
    finally:
        process.terminate()
        process.wait(START_LIMIT_S)


def test_nginx_forwards_requests_with_the_key(behind_nginx: tuple[str, ssl.SSLContext], data: Path) -> None:
    url, trust = behind_nginx
    image, prompt = (data / "red_circle.png").read_bytes(), "a green circle on a blue background"
    trusting = openai.DefaultHttpxClient(verify=trust)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, http_client=trusting, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["ovserve-builtin"]
        reply = client.images.edit(image=image, prompt=prompt)
        assert reply.data
        assert reply.data[0].b64_json
        stream = client.images.edit(image=image, prompt=prompt, stream=True, partial_images=2)
        assert [event.type for event in stream][-1] == "image_edit.completed"


def test_browser_at_the_public_address_is_served(behind_proxy: tuple[str, ssl.SSLContext], data: Path) -> None:
    url, trust = behind_proxy
    files = {"image": ("a.png", (data / "red_circle.png").read_bytes())}
    with httpx.Client(base_url=url, verify=trust, timeout=60, headers={"host": HOST}) as client:
        known = {"authorization": f"Bearer {KEY}"}
        fields, sni = {"prompt": "a green circle", "response_format": "url"}, {"sni_hostname": HOST}

        def edit(headers: dict[str, str]) -> httpx.Response:
            return client.post("/v1/images/edits", data=fields, files=files, headers=headers, extensions=sni)

        reply = edit({**known, "origin": f"https://{HOST}", "sec-fetch-site": "same-origin"})
        assert reply.status_code == 200, reply.text
        address = reply.json()["data"][0]["url"]
        assert address.startswith(f"https://{HOST}/v1/images/files/")
        picture = client.get(address.removeprefix(f"https://{HOST}"), headers=known, extensions=sni)
        assert (picture.status_code, picture.headers["x-content-type-options"]) == (200, "nosniff")
        assert edit({**known, "origin": "https://evil.test"}).status_code == 403
        assert client.get("/v1/models", extensions=sni).status_code == 401
        assert client.get("/metrics", headers=known, extensions=sni).status_code == 404


def test_nginx_rejects_a_wrong_key_and_other_paths(behind_nginx: tuple[str, ssl.SSLContext]) -> None:
    url, trust = behind_nginx
    with httpx.Client(base_url=url, verify=trust, timeout=60) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        for path in (
            "/metrics",
            "/v1/config",
            "/v1/config/reload",
            "/v2/health/ready",
            "//metrics",
            "/v1//config",
            "/",
        ):
            reply = client.get(path, headers={"authorization": f"Bearer {KEY}"})
            assert reply.status_code == 404, path


def test_nginx_leaves_size_limits_to_the_server(behind_nginx: tuple[str, ssl.SSLContext]) -> None:
    url, trust = behind_nginx
    form = {"prompt": "x" * 3_000_000}
    with httpx.Client(base_url=url, verify=trust, timeout=60) as client:
        reply = client.post(
            "/v1/images/edits", data=form, headers={"authorization": f"Bearer {KEY}"}, files={"image": b""}
        )
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "part_too_large"


def test_settings_example_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "ovserve.toml"
    path.write_text(re.sub(r"^   ", "", example("settings"), flags=re.MULTILINE))
    settings = load_settings({}, {}, path)
    assert settings.port == 8000
    assert [model.name for model in settings.models] == ["ovserve-builtin"]


def test_dockerfile_and_unit_match_the_page() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    for copied in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for line in ("USER ovserve", "/v2/health/ready", "STOPSIGNAL SIGTERM", "OVSERVE_HOST=0.0.0.0"):
        assert line in dockerfile
    unit = (ROOT / "scripts" / "ovserve.service").read_text("utf-8")
    assert "ExecStart=/opt/ovserve/bin/python -m ovserve --config /etc/ovserve.toml" in unit
    assert "CacheDirectory=ovserve" in unit


@pytest.fixture
def behind_caddy(server: LiveServer, tmp_path: Path) -> Iterator[str]:
    """Start Caddy with the configuration of the page; only addresses are replaced. Yields its URL."""
    port = free_port()
    text = example("caddy").replace(f"{HOST} {{", f"http://127.0.0.1:{port} {{", 1)
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    (tmp_path / "Caddyfile").write_text(f"{{\n    admin off\n    storage file_system {tmp_path}\n}}\n{text}")
    command = [find_program("caddy"), "run", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
    environment = {**os.environ, "HOME": str(tmp_path)}  # Caddy writes there
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_caddy_forwards_requests_with_the_key_and_nothing_else(behind_caddy: str) -> None:
    with openai.OpenAI(base_url=f"{behind_caddy}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["ovserve-builtin"]
        assert client.images.generate(prompt="a red star", extra_body={"num_inference_steps": 2}).data
    with httpx.Client(base_url=behind_caddy, timeout=60) as plain:
        assert plain.get("/v1/models").status_code == 401
        for path in ("/metrics", "/v1/config", "/v2/health/ready", "/"):
            assert plain.get(path, headers={"authorization": f"Bearer {KEY}"}).status_code == 404, path
