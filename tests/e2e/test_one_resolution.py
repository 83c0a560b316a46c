"""A model with one `resolution` and engine `genai`: compiled for one shape, as an NPU needs it, here on the CPU."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ovserve.engines.protocol import Pixels
from tests.live import LiveServer
from tests.pictures import directory_of, image_of
from tests.tinymodels import tiny_model

PINNED = 'plugin_config = \'{"INFERENCE_PRECISION_HINT": "f32"}\'\n'
STATIC = 'resolution = "64x96"\nnum_images_per_prompt = 2\n'
MODELS = {"sd": directory_of("sd"), "zimage": tiny_model("zimage")}
LEVELS = 2  # of 255: other kernels round otherwise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tables = [
        f"[[model]]\nname = {json.dumps(name + suffix)}\npath = {json.dumps(str(path))}\n{options}"
        'engine = "genai"\nthreads = 1\ncache_dir = "off"\nload = "lazy"\n' + PINNED
        for name, path in MODELS.items()
        for suffix, options in (("", STATIC), ("-dynamic", ""))
    ]
    config = tmp_path_factory.mktemp("static") / "ovserve.toml"
    config.write_text("default_timeout_s = 300\nport = 0\n" + "\n".join(tables))
    with LiveServer("--config", str(config)) as running:
        yield running


def png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


SOURCE = image_of(64, 96, 3)
MASK = np.zeros((96, 64), np.uint8)
MASK[40:] = 255


def edit(server: LiveServer, model: str, *, mask: bool = False, **fields: str) -> httpx.Response:
    files = {"image": ("a.png", png(SOURCE), "image/png")}
    if mask:
        files["mask"] = ("mask.png", png(MASK), "image/png")
    data = {"model": model, "prompt": "a cat", "num_inference_steps": "3", "seed": "7", "strength": "0.7", **fields}
    return httpx.post(f"{server.url}/v1/images/edits", data=data, files=files, timeout=300)


def generate(server: LiveServer, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "a cat", "num_inference_steps": 3, "seed": 7, **fields}
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)


def pixels_of(reply: httpx.Response) -> list[Pixels]:
    assert reply.status_code == 200, reply.text
    data = [base64.b64decode(each["b64_json"]) for each in reply.json()["data"]]
    return [np.array(Image.open(io.BytesIO(each)).convert("RGB")) for each in data]


@pytest.mark.parametrize("model", MODELS)
def test_pictures_are_those_of_the_model_without_a_static_shape(server: LiveServer, model: str) -> None:
    pairs = [
        (generate(server, model), generate(server, f"{model}-dynamic", n=2, size="64x96")),
        (edit(server, model), edit(server, f"{model}-dynamic", n="2", size="64x96")),
    ]
    if model == "sd":
        pairs.append((edit(server, model, mask=True), edit(server, f"{model}-dynamic", mask=True, n="2", size="64x96")))
    for reply, expected in pairs:
        for pixels, other in zip(pixels_of(reply), pixels_of(expected), strict=True):
            assert pixels.shape == (96, 64, 3)
            assert np.abs(pixels.astype(int) - other).max() <= LEVELS


REFUSED: list[tuple[dict[str, str], str]] = [
    ({"size": "96x64"}, "size"),
    ({"width": "64", "height": "64"}, "width"),
    ({"n": "1"}, "n"),
    ({"guidance_scale": "3"}, "guidance_scale"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
def test_other_sizes_numbers_and_scales_are_refused(server: LiveServer, fields: dict[str, str], param: str) -> None:
    for reply in (edit(server, "sd", **fields), generate(server, "sd", **fields)):
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param), error


def test_npu_without_a_resolution_is_a_configuration_error() -> None:
    running = LiveServer("--model_path", str(directory_of("sd")), "--device", "NPU", wait_ready=False)
    assert running.wait() == 2
    assert any("needs exactly one resolution" in line for line in running.log)
