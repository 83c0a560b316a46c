"""Masks on models that were not trained for them, and instruct-pix2pix, over HTTP.

The library serves none of these: Kontext and instruct-pix2pix at all, Z-Image and Qwen-Image with a mask.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ovserve.engines.protocol import Pixels
from tests.live import LiveServer
from tests.pictures import image_of
from tests.raycluster import three_nodes
from tests.tinymodels import tiny_model

MASKED = ("kontext", "zimage", "qwen")
MODELS = (*MASKED, "ip2p")
WIDTH, HEIGHT = 72, 90  # no multiples of 16, so the picture is worked on at another size
BLUR_PX = 8
TOP, LEFT = 21, 13  # of the masked rectangle, which no cell of latents fits


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tables = [
        f"[[model]]\nname = {json.dumps(name)}\npath = {json.dumps(str(tiny_model(name)))}\n"
        'engine = "auto"\nthreads = 1\nstreams = 1\nmax_batch = 4\ncache_dir = "off"\nload = "lazy"\n'
        for name in MODELS
    ]
    config = tmp_path_factory.mktemp("masked") / "ovserve.toml"
    # Lazy: models that load at the same time would need minutes on a busy machine.
    common = "default_timeout_s = 300\nport = 0\n"
    with ExitStack() as stack:
        environment = {}
        if getattr(request, "param", None) == "cluster":
            cluster = stack.enter_context(three_nodes())
            environment = cluster.environment
            common += f'default_pool = "ray"\nray_address = "{cluster.address}"\n'
            # All of them stay, whatever the processors of the nodes.
            tables = [f'{table}placement = "cpus=0.1"\n' for table in tables]
        config.write_text(common + "\n".join(tables))
        yield stack.enter_context(LiveServer("--config", str(config), environment=environment))


def png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


SOURCE = image_of(WIDTH, HEIGHT + 6, 3)[:HEIGHT]
INSIDE = np.zeros((HEIGHT, WIDTH), bool)
INSIDE[TOP:77, LEFT:60] = True
MASK = png(np.where(INSIDE, 255, 0).astype(np.uint8))


def post(server: LiveServer, model: str, *, mask: bool = False, **fields: str) -> httpx.Response:
    files = {"image": ("a.png", png(SOURCE), "image/png")}
    if mask:
        files["mask"] = ("mask.png", MASK, "image/png")
    data = {"model": model, "prompt": "make it blue", "num_inference_steps": "4", "seed": "7", **fields}
    return httpx.post(f"{server.url}/v1/images/edits", data=data, files=files, timeout=300)


def pixels_of(reply: httpx.Response, index: int = 0) -> Pixels:
    assert reply.status_code == 200, reply.text
    data = base64.b64decode(reply.json()["data"][index]["b64_json"])
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("model", MASKED)
def test_outside_the_mask_are_the_callers_own_pixels_and_the_seam_is_soft(server: LiveServer, model: str) -> None:
    hard, soft = (pixels_of(post(server, model, mask=True, mask_blur=blur)) for blur in ("0", str(BLUR_PX)))
    for painted in (hard, soft):
        np.testing.assert_array_equal(painted[~INSIDE], SOURCE[~INSIDE])
        assert (painted[INSIDE] != SOURCE[INSIDE]).mean() > 0.5
    assert not np.array_equal(hard, pixels_of(post(server, model, mask=True, prompt="a dog"))), (
        "the prompt has an effect"
    )
    core = np.zeros_like(INSIDE)
    core[TOP + BLUR_PX + 1 : 77 - BLUR_PX - 1, LEFT + BLUR_PX + 1 : 60 - BLUR_PX - 1] = True
    np.testing.assert_array_equal(soft[core], hard[core])
    edge = INSIDE.copy()
    edge[TOP + 1 : 76, LEFT + 1 : 59] = False  # the outermost pixels of the mask
    changes = [np.abs(painted[edge].astype(int) - SOURCE[edge]).mean() for painted in (soft, hard)]
    assert changes[0] < changes[1] / 2


@pytest.mark.parametrize("model", MASKED)
def test_pictures_of_one_masked_edit_equal_those_of_single_edits(server: LiveServer, model: str) -> None:
    both = post(server, model, mask=True, n="2")
    first, second = pixels_of(both), pixels_of(both, 1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, pixels_of(post(server, model, mask=True, seed="8")))


# --- instruct-pix2pix -------------------------------------------------------------------------------------------------


def test_instruct_pix2pix_follows_both_scales(server: LiveServer) -> None:
    plain = pixels_of(post(server, "ip2p"))
    assert plain.shape == SOURCE.shape
    assert not np.array_equal(plain, SOURCE)
    scaled = pixels_of(post(server, "ip2p", image_guidance_scale="2.5"))
    assert not np.array_equal(plain, scaled)
    for synonym in ("image_cfg_scale", "image_cfg"):
        np.testing.assert_array_equal(pixels_of(post(server, "ip2p", **{synonym: "2.5"})), scaled)
    assert not np.array_equal(plain, pixels_of(post(server, "ip2p", guidance_scale="3")))
    assert not np.array_equal(plain, pixels_of(post(server, "ip2p", negative_prompt="a dog")))


def error_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["param"]


def test_instruct_pix2pix_refuses_what_it_cannot_do(server: LiveServer) -> None:
    shown: dict[str, Any] = httpx.get(f"{server.url}/v1/models/ip2p", timeout=30).json()
    assert shown["features"]["reference_images"] == 1
    assert not shown["features"]["masks"]
    assert error_of(post(server, "ip2p", mask=True)) == (400, "mask")
    assert error_of(post(server, "ip2p", strength="0.5")) == (400, "strength")
    body = {"model": "ip2p", "prompt": "a cat", "size": "64x64"}
    made = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)
    assert made.status_code == 400
    assert "edit" in made.json()["error"]["message"]


@pytest.mark.parametrize("model", ["kontext", "qwen"])
def test_image_guidance_scale_is_refused_where_a_model_has_none(server: LiveServer, model: str) -> None:
    assert error_of(post(server, model, image_guidance_scale="2")) == (400, "image_guidance_scale")
