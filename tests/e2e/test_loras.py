"""LoRA adapters through the API, on the built-in model in a real worker: names, weights, sharing, metadata, reload."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.live import BUILTIN_PATH, LiveServer
from tests.loras import kohya_tensors, safetensors, write_adapter

PROMPT = "a red circle on a blue background"
CLIENTS = 8


class Styles:
    """A server of the model `base` with eight adapters, `s0` to `s7`, and a composite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "c.toml"
        self.files = [
            write_adapter(folder / f"s{number}.safetensors", number, text=number % 2 == 0) for number in range(CLIENTS)
        ]
        self.write()

    def write(self, *further: tuple[str, Path]) -> None:
        """Write the configuration; `further` are additional adapters."""
        tables = [
            f"[[model]]\nname = 'base'\npath = '{BUILTIN_PATH}'\nstreams = 2\nthreads = 1\nmax_batch = 8",
            "prompt_loras = true\ndefault_num_inference_steps = 4",
            *(f"[[model.lora]]\npath = '{path}'" for path in self.files),
            *(f"[[model.lora]]\nalias = '{alias}'\npath = '{path}'" for alias, path in further),
            "[[model.lora]]\nalias = 'soft'\nalpha = 0.5\n" + f"path = '{self.files[0]}'",
            "[[model.composite]]\nalias = 'blend'\ncomponents = {s0 = 0.5, s1 = 0.25}",
        ]
        self.config.write_text("\n".join(tables))


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Styles:
    return Styles(tmp_path_factory.mktemp("styles"))


@pytest.fixture(scope="module")
def live(styles: Styles) -> Iterator[LiveServer]:
    with LiveServer("--config", str(styles.config), "--admin_key", "k", spool=styles.folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=120) as client:
        yield client


def send(client: httpx.Client, model: str, **values: Any) -> httpx.Response:
    document = {"model": model, "prompt": PROMPT, "seed": 3, **values}
    return client.post("/v3/images/generations", json=document)


def picture(client: httpx.Client, model: str, **values: Any) -> bytes:
    """Return the pixels of a picture, and assert that it was made."""
    reply = send(client, model, **values)
    assert reply.status_code == 200, reply.text
    return Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))).tobytes()


def test_eight_clients_with_different_adapters_get_what_each_gets_alone(client: httpx.Client) -> None:
    names = [f"s{number}" for number in range(CLIENTS)]
    alone = {name: picture(client, name) for name in names}
    assert len(set(alone.values()) | {picture(client, "base")}) == CLIENTS + 1
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = dict(zip(names, pool.map(lambda name: picture(client, name), names), strict=True))
    assert together == alone


def test_weights_come_from_the_request_then_the_composite_then_the_adapter(client: httpx.Client) -> None:
    base = picture(client, "base")
    assert picture(client, "s0", lora_alphas={"s0": 0}) == base
    assert picture(client, "soft") == picture(client, "s0", lora_alphas={"s0": 0.5})
    blend = picture(client, "blend")
    assert blend == picture(client, "base", lora_alphas={"s0": 0.5, "s1": 0.25})
    assert blend == picture(client, "blend", lora_alphas={"s1": 0.25})
    assert blend != picture(client, "blend", lora_alphas={"s1": 0.75})


def test_weights_in_a_form_are_json_text_or_keys_in_brackets(client: httpx.Client) -> None:
    def form(**fields: str) -> bytes:
        data = {"model": "s0", "prompt": PROMPT, "seed": "3", **fields}
        reply = client.post("/v3/images/generations", files={key: (None, value) for key, value in data.items()})
        assert reply.status_code == 200, reply.text
        return base64.b64decode(reply.json()["data"][0]["b64_json"])

    assert form(lora_alphas='{"s0": 0.5}') == form(**{"lora_alphas[s0]": "0.5"})


def test_prompt_syntax_applies_adapters_and_is_removed_from_the_prompt(client: httpx.Client) -> None:
    assert picture(client, "base", prompt=f"<lora:s0:0.5> {PROMPT}") == picture(client, "soft")
    assert picture(client, "base", prompt=f"{PROMPT}<lora:blend>") == picture(client, "blend")
    reply = send(client, "base", prompt=f"{PROMPT} <lora:ghost:1>")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"
    assert "'<lora:ghost:1>'" in reply.json()["error"]["message"]


def test_models_list_names_adapters_with_their_base(client: httpx.Client) -> None:
    listed = {entry["id"]: entry for entry in client.get("/v3/models").json()["data"]}
    assert listed["blend"]["parent"] == "base"
    assert listed["blend"]["adapters"] == {"s0": 0.5, "s1": 0.25}
    assert listed["soft"]["adapters"] == {"soft": 0.5}
    assert "soft" in listed["base"]["adapters"]
    assert client.get("/v3/models/s3").json()["parent"] == "base"


def test_file_contains_the_adapters_and_their_weights(client: httpx.Client) -> None:
    reply = send(client, "blend", lora_alphas={"s1": -1})
    image = Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))
    settings = str(image.info["parameters"]).splitlines()[-1]
    assert f"Lora weights: {json.dumps('s0: 0.5, s1: -1')}" in settings


@pytest.mark.parametrize(
    ("model", "alphas", "words"),
    [
        ("s0", {"s1": 1}, ("'s1'", "'s0'")),
        ("blend", {"s2": 1}, ("'s2'", "'blend'")),
        ("base", {"ghost": 1}, ("'ghost'", "soft")),
        ("s0", {"s0": "high"}, ("expected a number",)),
        ("s0", {"s0": 101}, ("-100 to 100",)),
        ("s0", "x", ("valid JSON",)),
        ("s0", [], ("expected an object",)),
    ],
)
def test_wrong_weights_are_refused(client: httpx.Client, model: str, alphas: Any, words: tuple[str, ...]) -> None:
    reply = send(client, model, lora_alphas=alphas)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "lora_alphas"
    for word in words:
        assert word in reply.json()["error"]["message"]


def test_reload_adds_an_adapter(styles: Styles, client: httpx.Client) -> None:
    assert send(client, "late").status_code == 404
    before = picture(client, "s1")
    styles.write(("late", write_adapter(styles.folder / "late.safetensors", 99)))
    reload = client.post("/v1/config/reload?wait_s=110", headers={"authorization": "Bearer k"})
    assert reload.status_code == 200, reload.text
    assert picture(client, "late") not in (before, picture(client, "base"))
    assert picture(client, "s1") == before


def test_server_does_not_start_with_a_file_made_for_another_model(tmp_path: Path) -> None:
    data = write_adapter(tmp_path / "other.safetensors", 1).read_bytes()
    (tmp_path / "other.safetensors").write_bytes(data.replace(b"down_blocks_0", b"down_blocks_9"))
    with LiveServer("--source_loras", f"other={tmp_path}/other.safetensors", wait_ready=False) as server:
        assert server.process.wait(240) == 69
        log = "".join(server.log)
    assert "other.safetensors: 5 of its 5 modules are not in this model's denoiser" in log
    assert "lora_unet_down_blocks_9_attentions_0_proj_out" in log


def test_engine_genai_applies_adapters_with_the_weights_of_a_request(tmp_path: Path) -> None:
    tensors = {name: each for name, each in kohya_tensors(7, text=True).items() if "conv1" not in name}
    (tmp_path / "style.safetensors").write_bytes(safetensors(tensors))
    flags = ("--engine", "genai", "--source_loras", f"style={tmp_path}/style.safetensors")
    with LiveServer(*flags, spool=tmp_path) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        base = client.get("/v3/models").json()["data"][0]["id"]
        plain = picture(client, base)
        assert picture(client, "style") != plain
        assert picture(client, "style", lora_alphas={"style": 0.5}) not in (plain, picture(client, "style"))
        assert picture(client, "style", lora_alphas={"style": 0}) == plain
