"""Official clients in separate processes: two versions for Node, an old one for Python, curl; and retries after 429."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ovserve.models.profile import builtin_directory
from tests.live import LiveServer

ROOT = Path(__file__).parents[2]
NODE = ROOT / ".venv" / "node"  # made by scripts/test
NODE22 = NODE / "node_modules" / ".bin" / "node"
PROMPT = "a green circle on a blue background"


@pytest.fixture(scope="module")
def server_with_slash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Start a server whose model name contains a slash."""
    spool = tmp_path_factory.mktemp("spool")
    with LiveServer("--model_name", "me/shapes", "--model_path", str(builtin_directory()), spool=spool) as live:
        yield live


@pytest.fixture(scope="module")
def obliging_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Start a server with every option for clients that cannot be configured."""
    options = {
        "aliases": "*",
        "builtin_aliases": "true",
        "extra_images": "first",
        "unknown_fields": "ignore",
        "default_response_format": "url",
        "missing_alpha": "opaque",
        "store_dir": str(tmp_path_factory.mktemp("store")),
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    with LiveServer(*flags, spool=tmp_path_factory.mktemp("spool")) as live:
        yield live


def pixels(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.mark.parametrize("package", ["openai", "openai4"])
def test_node_client_is_served(server_with_slash: LiveServer, data: Path, package: str) -> None:
    script = Path(__file__).parent / "node" / "client.mjs"
    done = subprocess.run(
        [NODE22, script, NODE, package, server_with_slash.url, data],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["seed"] == 5
    assert output["list"] == output["edit"]
    source, masked = np.asarray(Image.open(data / "red_circle.png")), pixels(output["masked"])
    assert np.array_equal(masked[:24], source[:24])
    assert not np.array_equal(masked[24:104, 24:104], source[24:104, 24:104])
    if package == "openai":
        kinds = [event["type"] for event in output["events"]]
        assert kinds == ["image_edit.partial_image"] * (len(kinds) - 1) + ["image_edit.completed"]
        assert output["events"][-1]["b64_json"] == output["edit"]
        assert output["events"][-1]["usage"]["total_tokens"] > 0
    assert output["generated"] == 2
    assert output["models"] == ["me/shapes"]
    assert output["model"] == "me/shapes"
    assert output["bad"] == {
        "kind": "BadRequestError",
        "status": 400,
        "param": "n",
        "code": "invalid_value",
        "id": True,
    }
    assert (output["missing"]["kind"], output["missing"]["code"]) == ("NotFoundError", "model_not_found")


def test_last_python_client_of_version_one_is_served(server: LiveServer, data: Path) -> None:
    code = f"""
import json, openai
client = openai.OpenAI(base_url={server.url + "/v1"!r}, api_key="none", max_retries=0)
image = lambda: open({str(data / "red_circle.png")!r}, "rb")
output = {{"version": openai.__version__}}
output["edit"] = client.images.edit(image=image(), prompt={PROMPT!r}, extra_body={{"seed": 5}}).data[0].b64_json
output["list"] = client.images.edit(image=[image()], prompt={PROMPT!r}, extra_body={{"seed": 5}}).data[0].b64_json
output["events"] = [event.type for event in client.images.edit(image=image(), prompt={PROMPT!r}, stream=True)]
output["models"] = [model.id for model in client.models.list()]
try:
    client.images.edit(image=image(), prompt={PROMPT!r}, n=99)
except openai.BadRequestError as error:
    output["param"] = error.param
print(json.dumps(output))
"""
    python = ROOT / ".venv" / "openai1" / "bin" / "python"  # made by scripts/test
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["version"].startswith("1.")
    assert output["list"] == output["edit"]
    assert output["events"][-1] == "image_edit.completed"
    assert output["models"] == ["ovserve-builtin"]
    assert output["param"] == "n"


def test_curl_gets_100_continue_for_a_large_body(server: LiveServer, data: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    Image.open(data / "red_circle.png").resize((800, 800)).save(large)  # above 1 MiB curl waits for 100 Continue
    command = [
        "curl",
        "-sv",
        f"{server.url}/v3/images/edits",
        "-F",
        f"image=@{large}",
        "-F",
        f"prompt={PROMPT}",
        "-F",
        "size=128x128",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "HTTP/1.1 100 Continue" in done.stderr
    assert pixels(json.loads(done.stdout)["data"][0]["b64_json"]).shape == (128, 128, 3)


def test_queue_full_is_429_and_the_client_retries_after_the_given_time(tmp_path: Path) -> None:
    with LiveServer("--queue_limit", "1", "--engine", "genai", spool=tmp_path) as live:
        slow = {"num_inference_steps": 40}
        outcomes: list[str] = []
        waits: list[str] = []

        def generate(retries: int) -> None:
            with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=retries, timeout=120) as client:
                try:
                    raw = client.images.with_raw_response.generate(prompt="a star", extra_body=slow)
                    outcomes.append(f"done after {raw.retries_taken}")
                except openai.RateLimitError as error:
                    outcomes.append("rejected")
                    waits.append(error.response.headers["retry-after"])
                    assert error.code == "queue_full"
                    assert error.response.headers["x-should-retry"] == "true"

        threads = [threading.Thread(target=generate, args=(0,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "rejected" in outcomes
        assert "done after 0" in outcomes
        assert all(1 <= int(wait) <= 60 for wait in waits)
        threads = [threading.Thread(target=generate, args=(4,)) for _ in range(6)]
        outcomes.clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert any(outcome.startswith("done after") and not outcome.endswith(" 0") for outcome in outcomes)


# --- clients with names and fields of their own -----------------------------------------------------------------------

# The name that each client sends unless its user changes it, or always.
CLIENT_MODELS = {
    "n8n, LibreChat, Dify": "gpt-image-1",
    "Open WebUI": "dall-e-2",
    "LangChain, agno": "dall-e-3",
    "the example of diffusers": "default",
    "a name that came later": "gpt-image-9",
}


@pytest.mark.parametrize("name", CLIENT_MODELS.values(), ids=CLIENT_MODELS)
def test_model_is_found_under_the_name_that_a_client_sends(obliging_server: LiveServer, data: Path, name: str) -> None:
    with openai.OpenAI(base_url=f"{obliging_server.url}/v1", api_key="none", max_retries=0) as client:
        listed = [model.id for model in client.models.list()]
        assert (name in listed) == (name != "gpt-image-9")
        assert client.models.retrieve(name).id == name
        assert "*" not in listed
        with (data / "red_circle.png").open("rb") as image:
            reply = client.images.edit(model=name, image=image, prompt=PROMPT, extra_body={"seed": 5})
        assert reply.model == "ovserve-builtin"
        assert client.images.generate(model=name, prompt=PROMPT).model == "ovserve-builtin"
    deadline = time.monotonic() + 30
    while not (lines := [line for line in list(obliging_server.log) if "POST /v1/images/generations 200" in line]):
        assert time.monotonic() < deadline, "no line in the log"
        time.sleep(0.01)  # the line follows the reply, through a pipe
    assert all("model=ovserve-builtin" in line for line in lines)


def test_unknown_model_is_404_that_names_the_option(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="The server's option aliases adds further names"):
            client.images.generate(model="gpt-image-1", prompt=PROMPT)
        assert [model.id for model in client.models.list()] == ["ovserve-builtin"]


def test_client_of_dall_e_reads_a_url(obliging_server: LiveServer) -> None:
    """LangChain, CrewAI, agno and openai 0.28 send no response_format and read `.url`."""
    with openai.OpenAI(base_url=f"{obliging_server.url}/v1", api_key="none", max_retries=0) as client:
        [item] = client.images.generate(model="dall-e-3", prompt=PROMPT, size="256x256").data or []
        assert item.b64_json is None
        assert item.url
        picture = httpx.get(item.url)
        assert Image.open(io.BytesIO(picture.content)).size == (256, 256)
        events = list(client.images.generate(model="dall-e-3", prompt=PROMPT, stream=True))
        assert events[-1].b64_json


def test_second_edit_of_an_open_webui_chat_uses_the_newest_picture(obliging_server: LiveServer, data: Path) -> None:
    """It sends the result and the original, the newest first; the fields are those of its source code."""
    source = (data / "red_circle.png").read_bytes()
    fields = {"model": "", "prompt": PROMPT, "response_format": "b64_json", "seed": "5"}
    files = [("image[]", ("0b7f.png", source, "image/png")), ("image[]", ("1c2d.png", b"not read", "image/png"))]
    with httpx.Client(base_url=obliging_server.url, timeout=60) as client:
        reply = client.post("/v1//images/edits", data=fields, files=files)
        alone = client.post("/v1/images/edits", data=fields, files=files[:1])
        streamed = client.post("/v1/images/edits", data={**fields, "stream": "true"}, files=files)
    assert (reply.status_code, alone.status_code, streamed.status_code) == (200, 200, 200)
    assert reply.json()["ignored"] == ["image[1]"]
    assert "ignored" not in alone.json()
    assert reply.headers["x-ovserve-ignored"] == streamed.headers["x-ovserve-ignored"] == "image%5B1%5D"
    assert "x-ovserve-ignored" in reply.headers["access-control-expose-headers"]
    assert reply.json()["data"][0]["b64_json"] == alone.json()["data"][0]["b64_json"]
    last = json.loads(streamed.text.rsplit("data: ", 1)[1])
    assert (last["ignored"], last["model"]) == (["image[1]"], "ovserve-builtin")
    line = next(line for line in obliging_server.log if "POST /v1//images/edits 200" in line)
    assert "ignored=image%5B1%5D" in line


def test_error_reaches_a_client_that_shows_only_the_reason_phrase(server: LiveServer, data: Path) -> None:
    fields = {"prompt": PROMPT, "n": "64"}
    files = [("image[]", ("a.png", (data / "red_circle.png").read_bytes(), "image/png"))]
    reply = httpx.post(f"{server.url}/v1/images/edits", data=fields, files=files)
    with pytest.raises(httpx.HTTPStatusError, match="400 n is 64; this model allows at most 10"):
        reply.raise_for_status()
    assert reply.reason_phrase == reply.json()["error"]["message"]
    missing = httpx.post(f"{server.url}/api/images/edits", data=fields, files=files)
    assert missing.reason_phrase == (f"The path names 'api', which is not a model; the base URL is {server.url}/v1.")


def test_fields_that_chat_models_and_other_servers_add_are_served(obliging_server: LiveServer, data: Path) -> None:
    added = {"background": "transparent", "complexity": "low", "steps": 4, "cfg_scale": 2.0, "sampler": "Euler a"}
    with openai.OpenAI(base_url=f"{obliging_server.url}/v1", api_key="none", max_retries=0) as client:
        with (data / "red_circle.png").open("rb") as image:
            raw = client.images.with_raw_response.edit(
                image=image, prompt=PROMPT, size="256X256", extra_body={**added, "clip_skip": 2}
            )
        reply = raw.parse()
    assert (reply.background, reply.ignored) == ("opaque", ["clip_skip"])
    assert raw.headers["x-ovserve-ignored"] == "clip_skip"


def test_strength_zero_returns_the_source(server: LiveServer, data: Path) -> None:
    image = (data / "red_circle.png").read_bytes()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        reply = client.images.edit(image=image, prompt=PROMPT, extra_body={"strength": 0})
    source = np.asarray(Image.open(data / "red_circle.png").convert("RGB"))
    assert np.array_equal(pixels((reply.data or [])[0].b64_json or ""), source)


def test_curl_encoded_fields_are_decoded_and_urlencoded_bodies_get_a_hint(server: LiveServer, data: Path) -> None:
    text = "a green circle on a blue background, caf\u00e9 = 1"
    command = ["curl", "-s", f"{server.url}/v1/images/edits", "-F", f"image=@{data / 'red_circle.png'}"]
    made = [
        subprocess.run([*command, "-F", f"prompt={text};encoder={encoder}", "-F", "seed=5"], capture_output=True,
                       text=True, timeout=60, check=True)
        for encoder in ("quoted-printable", "base64", "8bit")
    ]  # fmt: skip
    first, *others = [json.loads(done.stdout)["data"][0]["b64_json"] for done in made]
    assert others == [first, first]
    sent = ["curl", "-s", f"{server.url}/v1/images/generations", "-d", json.dumps({"prompt": PROMPT})]
    error = json.loads(subprocess.run(sent, capture_output=True, text=True, timeout=60, check=True).stdout)["error"]
    assert "-H 'Content-Type: application/json'" in error["message"]
