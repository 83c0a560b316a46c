"""Small models of today's families behind a live server with engine `genai`: what clients can do with each."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.live import LiveServer
from tests.tinymodels import tiny_model

MODELS = ("klein", "zimage", "qwen", "fluxfill", "fluxdev")
NO_MASK = ("klein", "zimage", "qwen")


def heavy(*models: str) -> list[Any]:
    """Return parameters for models that only the heavy tier loads."""
    return [pytest.param(model, marks=pytest.mark.heavy) for model in models]


DRAWING = ["klein", "zimage", *heavy("qwen", "fluxdev")]  # all but the one that only inpaints
STEPS = {"num_inference_steps": "2", "seed": "1", "prompt": "a cat"}
RNG = np.random.default_rng(3)


def png(width: int = 64, height: int = 48, mode: str = "RGB") -> bytes:
    """Return noise as a PNG file."""
    planes = len(mode)
    pixels = RNG.integers(0, 256, (height, width, planes), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if planes > 1 else pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE, OTHER = png(), png()
MASK = np.zeros((48, 64), np.uint8)
MASK[:, 32:] = 255


def mask_file() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(MASK).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tables = [
        f"[[model]]\nname = {json.dumps(name)}\npath = {json.dumps(str(tiny_model(name)))}\n"
        'engine = "genai"\nthreads = 1\ncache_dir = "off"\nload = "lazy"\n'
        for name in MODELS
    ]
    config = tmp_path_factory.mktemp("families") / "ovserve.toml"
    # Lazy: five models that load at the same time would need minutes on a busy machine.
    config.write_text("default_timeout_s = 300\nport = 0\n" + "\n".join(tables))
    with LiveServer("--config", str(config)) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as found:
        yield found


def edit(client: httpx.Client, model: str, *images: bytes, mask: bool = False, **fields: str) -> httpx.Response:
    files = [("image[]", (f"{number}.png", image, "image/png")) for number, image in enumerate(images)]
    if mask:
        files.append(("mask", ("mask.png", mask_file(), "image/png")))
    return client.post("/v3/images/edits", data={"model": model, **STEPS, **fields}, files=files)


def generate(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "a cat", "num_inference_steps": 2, "seed": 1, "size": "64x48", **fields}
    return client.post("/v3/images/generations", json=body)


def pixels_of(reply: httpx.Response, number: int = 0) -> np.ndarray[Any, Any]:
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][number]["b64_json"]))))


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    """Return status, field and message of an error."""
    error = reply.json()["error"]
    return reply.status_code, error["param"], error["message"]


FEATURES = {
    "klein": (1, False, False, False, "none", True),
    "zimage": (0, False, True, True, "classifier-free", True),
    "qwen": (0, False, True, True, "classifier-free", False),
    "fluxfill": (0, True, False, True, "embedded", False),
    "fluxdev": (0, True, False, True, "embedded", False),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_model_object_shows_what_a_model_takes(client: httpx.Client, model: str) -> None:
    shown = client.get(f"/v3/models/{model}").json()
    names = ("reference_images", "masks", "negative_prompt", "strength", "guidance", "distilled")
    assert tuple(shown["features"][name] for name in names) == FEATURES[model]
    assert shown["prompt_tokens"] == 512


@pytest.mark.parametrize("model", DRAWING)
def test_generation_has_the_size_and_depends_on_the_seed(client: httpx.Client, model: str) -> None:
    two = generate(client, model, n=2)
    first, second = pixels_of(two), pixels_of(two, 1)
    assert first.shape == (48, 64, 3)
    assert not np.array_equal(first, second)
    assert np.array_equal(pixels_of(generate(client, model, seed=2)), second)


@pytest.mark.parametrize("model", DRAWING)
def test_edit_depends_on_the_image(client: httpx.Client, model: str) -> None:
    # With 2 steps at the default strength of 0.6, all of them run: from noise alone.
    first, second = (pixels_of(edit(client, model, image, num_inference_steps="4")) for image in (IMAGE, OTHER))
    assert first.shape == (48, 64, 3)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("model", ["fluxfill", *heavy("fluxdev")])
def test_masked_edit_keeps_what_is_outside_the_mask(client: httpx.Client, model: str) -> None:
    painted = pixels_of(edit(client, model, IMAGE, mask=True))
    source = np.asarray(Image.open(io.BytesIO(IMAGE)))
    assert np.array_equal(painted[MASK == 0], source[MASK == 0])
    assert not np.array_equal(painted[MASK > 0], source[MASK > 0])


def test_reference_in_a_json_body_gives_the_picture_of_the_form(client: httpx.Client) -> None:
    url = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    body = {"model": "klein", "prompt": "a cat", "num_inference_steps": 2, "seed": 1, "images": [{"image_url": url}]}
    reply = client.post("/v3/images/edits", json=body)
    assert np.array_equal(pixels_of(reply), pixels_of(edit(client, "klein", IMAGE)))
    body["images"] = [{"image_url": url}, {"image_url": url}]
    status, _, message = error_of(client.post("/v3/images/edits", json=body))
    assert status == 400
    assert "takes 1 reference image" in message


@pytest.mark.parametrize("model", ["klein", "fluxfill"])
def test_edit_is_streamed(client: httpx.Client, model: str) -> None:
    data = {"model": model, **STEPS, "stream": "true"}
    files = [("image", ("a.png", IMAGE, "image/png"))]
    if model == "fluxfill":
        files.append(("mask", ("mask.png", mask_file(), "image/png")))
    with client.stream("POST", "/v3/images/edits", data=data, files=files) as reply:
        text = reply.read().decode()
    assert reply.status_code == 200
    assert ": picture 1: step" in text
    assert "image_edit.completed" in text


@pytest.mark.parametrize("model", ["klein", *heavy("zimage")])
def test_picture_of_a_client_that_has_gone_is_not_finished(client: httpx.Client, model: str) -> None:
    started = time.monotonic()
    pixels_of(generate(client, model, num_inference_steps=2))
    alone_s = time.monotonic() - started
    body = {"model": model, "prompt": "a cat", "num_inference_steps": 100, "stream": True, "size": "128x128"}
    with client.stream("POST", "/v3/images/generations", json=body) as reply:
        for line in reply.iter_lines():
            if "step" in line:
                break
    started = time.monotonic()
    pixels_of(generate(client, model, num_inference_steps=2))
    waited_s = time.monotonic() - started
    assert waited_s < 10 * alone_s + 5, (waited_s, alone_s)
    assert f'ovserve_jobs_total{{model="{model}",state="cancelled"}} 1.0' in client.get("/metrics").text


def refused(client: httpx.Client) -> Iterator[tuple[str, httpx.Response, str, str]]:
    """Yield requests that a model cannot serve: name, reply, the field at fault, a part of the message."""
    for model in MODELS:
        if model != "fluxfill":
            yield model, edit(client, model, IMAGE, OTHER), "image[]", "takes"
        if model in NO_MASK:
            yield model, edit(client, model, IMAGE, mask=True), "mask", "cannot inpaint"
    yield "klein", edit(client, "klein", IMAGE, strength="0.5"), "strength", "starts from the image"
    yield "klein", edit(client, "klein", IMAGE, negative_prompt="dog"), "negative_prompt", "classifier-free"
    yield "klein", edit(client, "klein", IMAGE, prompt_2="dog"), "prompt_2", "second text encoder"
    yield "klein", edit(client, "klein", IMAGE, max_sequence_length="256"), "max_sequence_length", "T5"
    yield "klein", edit(client, "klein", IMAGE, scheduler="ddim"), "scheduler", "ddim"
    yield "zimage", edit(client, "zimage", IMAGE, negative_prompt="dog"), "negative_prompt", "guidance off"
    yield "qwen", edit(client, "qwen", IMAGE, strength="1.5"), "strength", "at most 1"
    yield "fluxfill", edit(client, "fluxfill", IMAGE), "mask", "only inpaints"
    yield "fluxfill", generate(client, "fluxfill"), "model", "images/edits"
    yield "fluxdev", generate(client, "fluxdev", negative_prompt="dog"), "negative_prompt", "classifier-free"


def test_what_a_model_does_not_have_is_refused_before_any_step(client: httpx.Client) -> None:
    for model, reply, field, part in refused(client):
        status, param, message = error_of(reply)
        assert (status, param) == (400, field), (model, message)
        assert part in message, (model, message)


def test_fields_of_a_model_that_has_them_are_used(client: httpx.Client) -> None:
    plain = pixels_of(generate(client, "zimage", guidance_scale=1))
    assert not np.array_equal(pixels_of(generate(client, "zimage", guidance_scale=1, negative_prompt="dog")), plain)
    assert not np.array_equal(pixels_of(generate(client, "zimage")), plain)
    weak, strong = (pixels_of(edit(client, "zimage", IMAGE, strength=strength)) for strength in ("0.5", "1"))
    assert not np.array_equal(weak, strong)
    reply = edit(client, "klein", IMAGE, guidance_scale="4", input_fidelity="high")
    assert np.array_equal(pixels_of(reply), pixels_of(edit(client, "klein", IMAGE)))
    assert reply.json()["ignored"] == ["guidance_scale", "input_fidelity"]


@pytest.mark.parametrize("model", ["klein", "zimage", *heavy("qwen")])
def test_prompt_is_counted_with_its_chat_template(client: httpx.Client, model: str) -> None:
    # A token of these tokenizers is a byte; the window of 512 leaves room for the template.
    status, param, message = error_of(generate(client, model, prompt="a" * 512))
    assert (status, param) == (400, "prompt")
    assert "this model reads at most 512, those of its chat template included" in message
    shown = int(message.removeprefix("prompt: ").split()[0])
    room = 512 - (shown - 512)
    assert generate(client, model, prompt="a" * room).status_code == 200
    assert generate(client, model, prompt="a" * (room + 1)).status_code == 400
    cut = generate(client, model, prompt="a" * 600, truncate_prompt=True)
    assert cut.json()["data"][0]["revised_prompt"] == "a" * room


def test_server_names_what_is_served_for_a_class_that_is_not(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    running = LiveServer("--model_path", str(directory), wait_ready=False)
    assert running.wait() == 2
    [line] = [line for line in running.log if "SanaPipeline" in line]
    assert "Flux2KleinPipeline" in line
    assert "ZImagePipeline" in line
