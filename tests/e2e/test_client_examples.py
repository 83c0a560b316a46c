"""The examples of docs/clients.md are extracted and run as they are; only the address of the server is replaced."""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ovserve.models.profile import builtin_directory
from ovserve.settings.sources import load_settings
from tests.live import LiveServer
from tests.reader import COLOURS, SHAPES, Scene, read_picture

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text("utf-8")
ENVIRONMENT = ROOT / ".venv"  # made by scripts/test; contains the other clients
ADDRESS = "http://127.0.0.1:8000"
TIMEOUT_S = 240
RUNNABLE = {"sh", "python", "js"}

GREEN_CIRCLE = ("blue", "green", "circle")
YELLOW_STAR = ("blue", "yellow", "star")
RED_HEART = ("white", "red", "heart")
Content = tuple[str, str, str]  # background, colour and shape of the largest object


@dataclass(frozen=True, slots=True)
class Example:
    """One block of the page: its Python, and the pictures it must write: side in pixels and content, by file name."""

    python: Path = Path(sys.executable)
    pictures: Mapping[str, tuple[int, Content | None]] = field(default_factory=dict)


README_PICTURES = {"edited.png": (256, GREEN_CIRCLE)}
EXAMPLES = {
    "shell-edit": Example(
        pictures={
            "edited.png": (256, GREEN_CIRCLE),
            "masked.png": (256, YELLOW_STAR),
            "heart.png": (256, RED_HEART),
        }
    ),
    "a1111": Example(pictures={"starred.png": (256, YELLOW_STAR)}),
    "curl-edit": Example(pictures={"edited.png": (256, GREEN_CIRCLE)}),
    "curl-mask": Example(pictures={"masked.png": (256, YELLOW_STAR)}),
    "curl-generation": Example(pictures={"generated.png": (256, RED_HEART)}),
    "curl-variation": Example(pictures={"variation.png": (256, None)}),
    "curl-json": Example(pictures={"from_json.png": (256, GREEN_CIRCLE)}),
    "curl-url": Example(pictures={"fetched.png": (256, GREEN_CIRCLE)}),
    "curl-stream": Example(pictures={"streamed.png": (256, GREEN_CIRCLE)}),
    "python-edit": Example(pictures={"edited.png": (256, GREEN_CIRCLE)}),
    "python-mask": Example(pictures={f"masked-{seed}.png": (256, YELLOW_STAR) for seed in (7, 8, 9)}),
    "python-stream": Example(
        pictures={"preview-0.png": (256, None), "preview-1.png": (256, None), "final.png": (256, GREEN_CIRCLE)}
    ),
    "python-generation": Example(pictures={"generated.webp": (256, RED_HEART)}),
    "node-edit": Example(
        pictures={
            "edited.png": (256, GREEN_CIRCLE),
            "preview-0.png": (256, None),
            "preview-1.png": (256, None),
            "masked.png": (256, YELLOW_STAR),
            "generated.png": (256, RED_HEART),
        }
    ),
    "litellm": Example(
        python=ENVIRONMENT / "litellm" / "bin" / "python",
        pictures={"edited.png": (256, GREEN_CIRCLE), "generated.png": (256, RED_HEART)},
    ),
    "azure": Example(pictures={"edited.png": (256, GREEN_CIRCLE)}),
    "gpt-image-1": Example(pictures={"edited.png": (256, GREEN_CIRCLE)}),
}


def blocks() -> dict[str, tuple[str, str]]:
    """Return the language and the text of each marked block, by its name."""
    marked = re.findall(r"^<!-- example: (\S+) -->\n```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return {name: (language, text) for name, language, text in marked}


def run(name: str, url: str, folder: Path) -> None:
    """Run a block in a folder in which `tests` is a link to the samples, as in the checkout."""
    language, text = blocks()[name]
    assert ADDRESS in text
    text = text.replace(ADDRESS, url)
    text = text.replace(".venv/bin/ovserve", f"{sys.executable} -m ovserve")  # the checkout's own, wherever it is
    (folder / "tests").symlink_to(ROOT / "tests")
    command = {"sh": ["bash", "-euo", "pipefail", "-c", text], "python": [str(EXAMPLES[name].python), "-c", text]}
    if language == "js":
        (folder / "node_modules").symlink_to(ENVIRONMENT / "node" / "node_modules")
        (folder / "edit.mjs").write_text(text, "utf-8")
        command["js"] = [str(ENVIRONMENT / "node" / "node_modules" / ".bin" / "node"), "edit.mjs"]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        command[language], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def wrong_contents(folder: Path, pictures: Mapping[str, tuple[int, Content | None]]) -> dict[str, object]:
    """Check that a folder contains exactly these pictures, with the expected format and size.

    Return the contents that differ from those expected, by file name.
    """
    wrong: dict[str, object] = {}
    written = {path.name for path in folder.iterdir() if path.suffix in {".png", ".webp"}}
    assert written == set(pictures)
    for name, (side, content) in pictures.items():
        with Image.open(folder / name) as picture:
            assert picture.format == Path(name).suffix[1:].upper()
            assert picture.size == (side, side)
            scene = read_picture(np.asarray(picture.convert("RGB")))
        if content and content_of(scene) != content:
            wrong[name] = content_of(scene)
    return wrong


def run_until_right(name: str, url: str, folder: Path) -> None:
    """Run a block in a new folder, and once more if a picture shows something else.

    The seeds are random, and the model draws another shape in about one of a hundred cases (its card).
    """
    for attempt in ("first", "second"):
        (folder / attempt).mkdir()
        run(name, url, folder / attempt)
        if not (wrong := wrong_contents(folder / attempt, EXAMPLES[name].pictures)):
            return
    raise AssertionError(f"{name} has made other pictures twice: {wrong}")


def content_of(scene: Scene) -> tuple[str, str | None, str | None]:
    largest = scene.largest
    return (scene.background, largest.colour, largest.shape) if largest else (scene.background, None, None)


def test_every_runnable_block_is_an_example() -> None:
    assert set(blocks()) == set(EXAMPLES)
    languages = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    runnable = [language for language in languages if language in RUNNABLE]
    assert len(runnable) == len(EXAMPLES), "a block without its `<!-- example: NAME -->`"
    assert {language for language in languages if language} <= RUNNABLE | {"text", "yaml"}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "gpt-image-1"])
def test_example_runs_and_writes_its_pictures(name: str, server: LiveServer, tmp_path: Path) -> None:
    run_until_right(name, server.url, tmp_path)


def test_commands_of_the_readme_edit_a_picture(server: LiveServer, tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```(?:sh|python)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    edits = [text for text in blocks if "tests/data/red_circle.png" in text]
    assert [text.split()[0] for text in edits] == [".venv/bin/ovserve", "curl", "from"]
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for text in edits:
        printed = run_readme(text, server.url, tmp_path)
        if text.startswith("from"):
            assert re.fullmatch(r"iVBORw0KGgo\S+ \d+\n", printed)
        elif wrong_contents(tmp_path, README_PICTURES):  # a random seed: see run_until_right
            (tmp_path / "edited.png").unlink()
            run_readme(text, server.url, tmp_path)
            assert not wrong_contents(tmp_path, README_PICTURES)
        (tmp_path / "edited.png").unlink(missing_ok=True)


def run_readme(text: str, url: str, folder: Path) -> str:
    """Run a block of the README in a folder; return what it prints."""
    command = ["bash", "-euo", "pipefail", "-c"] if not text.startswith("from") else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, text.replace(".venv/bin/ovserve", f"{sys.executable} -m ovserve").replace(ADDRESS, url)],
        cwd=folder,
        env={**os.environ, "OVSERVE_URL": url},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_litellm_passes_a_seed_in_extra_body(server: LiveServer, tmp_path: Path) -> None:
    run("litellm", server.url, tmp_path)
    with Image.open(tmp_path / "edited.png") as picture:
        assert "Seed: 7," in picture.info["parameters"]


def test_mask_example_keeps_the_pixels_outside(server: LiveServer, data: Path, tmp_path: Path) -> None:
    run("curl-mask", server.url, tmp_path)
    result, source = (
        np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "masked.png", data / "red_circle.png")
    )
    outside = np.asarray(Image.open(data / "mask_alpha.png"))[..., 3] > 0
    assert np.array_equal(result[outside], source[outside])


def test_curl_example_prints_the_error_and_fails(server: LiveServer, tmp_path: Path) -> None:
    _, text = blocks()["curl-edit"]
    text = text.replace(ADDRESS, server.url).replace("prompt=", "promt=")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "did you mean prompt?" in done.stderr


def test_model_can_be_served_as_gpt_image_1(tmp_path: Path) -> None:
    command = re.search(r"^scripts/serve (--aliases \S+)$", PAGE, re.MULTILINE)
    assert command
    with LiveServer(*command[1].split(), spool=tmp_path, model=None) as live:
        run_until_right("gpt-image-1", live.url, tmp_path)
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["ovserve-builtin", "gpt-image-1"]


def test_options_for_programs_that_cannot_be_configured_are_accepted() -> None:
    command = re.search(r"^scripts/serve (--builtin_aliases .+)$", PAGE, re.MULTILINE)
    assert command
    words = shlex.split(command[1])
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    [model] = load_settings(flags, {}).models
    assert model.all_aliases[0] == "*"
    for name in set(flags) - {"aliases", "builtin_aliases"}:
        assert getattr(model, name) == flags[name]
        assert f'| `{name} = "{flags[name]}"`' in PAGE


def test_requests_of_open_webui_are_served(server: LiveServer, data: Path) -> None:
    headers = {"authorization": "Bearer none"}
    with httpx.Client(base_url=f"{server.url}/v1", headers=headers, timeout=60) as client:
        document = {
            "model": "ovserve-builtin",
            "prompt": "a red heart on a white background",
            "n": 1,
            "size": "256x256",
        }
        generated = client.post("/images/generations", json={**document, "response_format": "b64_json"})
        fields = {"model": "", "prompt": "a green circle on a blue background", "response_format": "b64_json"}
        files = [("image[]", ("0b7f.png", (data / "red_circle.png").read_bytes(), "image/png"))]
        edited = client.post("/images/edits", data=fields, files=files)
        again = client.post("/images/edits", data=fields, files=files * 2)  # the second edit of one chat
    assert (again.status_code, again.json()["error"]["param"]) == (400, "image[]")
    assert (generated.status_code, edited.status_code) == (200, 200)
    assert (generated.json()["size"], edited.json()["size"]) == ("256x256", "256x256")
    assert all(reply.json()["data"][0]["b64_json"] for reply in (generated, edited))


def test_recommended_prompts_work(server: LiveServer, data: Path) -> None:
    """Recolour, reshape, new background: at least one of three seeds gives the wanted picture, as the page says."""
    image = (data / "red_circle.png").read_bytes()
    wanted = {
        "a green circle on a blue background": GREEN_CIRCLE,
        "a white cross on a blue background": ("blue", "white", "cross"),
        "a red circle on a yellow background": ("yellow", "red", "circle"),
    }
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for prompt, content in wanted.items():
            assert f"`{prompt}`" in PAGE
            reply = client.images.edit(image=image, prompt=prompt, n=3, extra_body={"seed": 1})
            contents = [content_of(read_picture(decoded(item.b64_json or ""))) for item in reply.data or []]
            assert content in contents, prompt


def decoded(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_page_lists_the_words_of_the_model_card() -> None:
    card = (builtin_directory() / "MODEL_CARD.md").read_text("utf-8")
    for words in (SHAPES, tuple(COLOURS)):
        assert ", ".join(words) in PAGE
        assert ", ".join(words) in card
