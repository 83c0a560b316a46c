"""Other official clients in processes of their own: Node at two versions, an old Python one, curl; and what they do when told to wait."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
def slashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    spool = tmp_path_factory.mktemp("spool")
    with LiveServer("--model_name", "me/shapes", "--model_path", str(builtin_directory()), spool=spool) as live:
        yield live


def pixels(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.mark.parametrize("package", ["openai", "openai4"])
def test_the_node_client(slashed: LiveServer, data: Path, package: str) -> None:
    script = Path(__file__).parent / "node" / "client.mjs"
    done = subprocess.run(
        [NODE22, script, NODE, package, slashed.url, data], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["seed"] == 5
    assert told["list"] == told["edit"]
    source, masked = np.asarray(Image.open(data / "red_circle.png")), pixels(told["masked"])
    assert np.array_equal(masked[:24], source[:24])
    assert not np.array_equal(masked[24:104, 24:104], source[24:104, 24:104])
    if package == "openai":
        kinds = [event["type"] for event in told["events"]]
        assert kinds == ["image_edit.partial_image"] * (len(kinds) - 1) + ["image_edit.completed"]
        assert told["events"][-1]["b64_json"] == told["edit"]
        assert told["events"][-1]["usage"]["total_tokens"] > 0
    assert told["generated"] == 2
    assert told["models"] == ["me/shapes"]
    assert told["model"] == "me/shapes"
    assert told["bad"] == {"kind": "BadRequestError", "status": 400, "param": "n", "code": "invalid_value", "id": True}
    assert (told["missing"]["kind"], told["missing"]["code"]) == ("NotFoundError", "model_not_found")


def test_the_last_python_client_of_the_first_major_version(server: LiveServer, data: Path) -> None:
    code = f"""
import json, openai
client = openai.OpenAI(base_url={server.url + "/v1"!r}, api_key="none", max_retries=0)
image = lambda: open({str(data / "red_circle.png")!r}, "rb")
told = {{"version": openai.__version__}}
told["edit"] = client.images.edit(image=image(), prompt={PROMPT!r}, extra_body={{"seed": 5}}).data[0].b64_json
told["list"] = client.images.edit(image=[image()], prompt={PROMPT!r}, extra_body={{"seed": 5}}).data[0].b64_json
told["events"] = [event.type for event in client.images.edit(image=image(), prompt={PROMPT!r}, stream=True)]
told["models"] = [model.id for model in client.models.list()]
try:
    client.images.edit(image=image(), prompt={PROMPT!r}, n=99)
except openai.BadRequestError as error:
    told["param"] = error.param
print(json.dumps(told))
"""
    python = ROOT / ".venv" / "openai1" / "bin" / "python"  # made by scripts/test
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"].startswith("1.")
    assert told["list"] == told["edit"]
    assert told["events"][-1] == "image_edit.completed"
    assert told["models"] == ["ovserve-builtin"]
    assert told["param"] == "n"


def test_curl_with_a_body_that_it_announces_first(server: LiveServer, data: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    Image.open(data / "red_circle.png").resize((800, 800)).save(large)  # over 1 MiB: curl waits for 100 Continue
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


def test_a_full_queue_is_429_and_the_client_waits_as_told(tmp_path: Path) -> None:
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
                    outcomes.append("refused")
                    waits.append(error.response.headers["retry-after"])
                    assert error.code == "queue_full"
                    assert error.response.headers["x-should-retry"] == "true"

        threads = [threading.Thread(target=generate, args=(0,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "refused" in outcomes
        assert "done after 0" in outcomes
        assert all(1 <= int(wait) <= 60 for wait in waits)
        crowd = [threading.Thread(target=generate, args=(4,)) for _ in range(6)]
        outcomes.clear()
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        assert any(outcome.startswith("done after") and not outcome.endswith(" 0") for outcome in outcomes)
