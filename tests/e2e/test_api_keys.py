"""API keys on a live server: official clients, open paths, and reloads that change the keys."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from ovserve.api.routes import match_route
from ovserve.cli.commands import ExitCode
from tests.faultserver import FaultServer
from tests.live import BUILTIN_PATH, LiveServer


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[FaultServer]:
    (tmp_path / "spool").mkdir()
    (tmp_path / "keys").write_text("# the office\nsk-one\n")
    (tmp_path / "keys").chmod(0o600)
    with FaultServer(tmp_path / "spool", "--api_key_file", str(tmp_path / "keys")) as server:
        yield server


def ask(server: FaultServer, key: str) -> openai.types.ImagesResponse:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
        return client.images.generate(prompt="echo hello")


def test_official_clients_get_401_once_and_do_not_retry(keyed: FaultServer) -> None:
    assert ask(keyed, "sk-one").data
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(keyed, "sk-wrong")
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (
        401,
        "invalid_api_key",
        "invalid_request_error",
    )
    keyed.until(lambda: bool(keyed.logged("/v1/images/generations 401")))
    assert len(keyed.logged("/v1/images/generations 401")) == 1  # not retried
    with (
        openai.AzureOpenAI(
            azure_endpoint=keyed.url, api_key="sk-one", api_version="2025-04-01-preview", azure_deployment="toy"
        ) as azure,
        pytest.raises(openai.NotFoundError),
    ):  # the key is accepted; the model does not exist
        azure.images.generate(prompt="echo hello")
    assert not keyed.logged("sk-one")
    assert not keyed.logged("sk-wrong")


def test_health_is_open_and_metrics_require_the_key(keyed: FaultServer) -> None:
    with keyed.client() as client:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        for path in ("/metrics", "/v1/models", "/openapi.json", "/v1/config"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer sk-one"}).status_code == 200
        for headers in ({}, {"authorization": "Bearer sk-one"}):  # for operators only
            assert client.post("/v1/config/reload", headers=headers).status_code == 403
        preflight = client.options("/v1/images/edits", headers={"access-control-request-headers": "authorization"})
        assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (204, "authorization")


def test_rejected_requests_are_counted_and_401_is_in_the_document(keyed: FaultServer) -> None:
    with keyed.client() as client:
        assert client.get("/made/up").status_code == 401
        client.headers["api-key"] = "sk-one"
        assert 'ovserve_http_responses_total{route="invalid_api_key",status="401"} 1.0' in client.get("/metrics").text
        document = client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey", "basic"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            is_open = match_route(method.upper(), path).is_open
            assert ("401" in operation["responses"]) is not is_open, path
            assert ("security" in operation) is is_open


def test_reload_changes_the_keys_or_nothing(keyed: FaultServer, tmp_path: Path) -> None:
    def is_known(key: str) -> bool:
        return httpx.get(f"{keyed.url}/v1/models", headers={"api-key": key}).status_code == 200

    (tmp_path / "keys").write_text("\n")
    keyed.signal(signal.SIGHUP)
    keyed.until(lambda: bool(keyed.logged("reload failed, the old configuration stays", "no key found")))
    assert is_known("sk-one")
    (tmp_path / "keys").write_text("sk-two\n")
    keyed.signal(signal.SIGHUP)
    keyed.until(lambda: is_known("sk-two"))
    assert not is_known("sk-one")


def test_missing_key_file_stops_the_start(tmp_path: Path) -> None:
    with LiveServer("--api_key_file", str(tmp_path / "none"), spool=tmp_path, wait_ready=False) as server:
        assert server.process.wait(60) == ExitCode.TRANSIENT
        assert server.log == [f"ovserve: api_key_file {tmp_path / 'none'}: No such file or directory"]


def test_reload_without_keys_is_logged(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    model = f'[[model]]\npath = "{BUILTIN_PATH}"\nplugin_config = "{{}}"\n'
    config.write_text(f'api_key = "sk-one"\n{model}')
    with FaultServer(tmp_path, "--config", str(config)) as server:
        config.write_text(model)
        server.signal(signal.SIGHUP)
        server.until(lambda: bool(server.logged("reloaded", "api_keys=0")))
        assert server.logged("no API key is configured any more")
