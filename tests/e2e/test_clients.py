"""Official clients in separate processes: two versions for Node, an old one for Python, curl; and retries after 429."""

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
def server_with_slash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Start a server whose model name contains a slash."""
    spool = tmp_path_factory.mktemp("spool")
    with LiveServer("--model_name", "me/shapes", "--model_path", str(builtin_directory()), spool=spool) as live:
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
