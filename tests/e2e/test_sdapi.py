"""AUTOMATIC1111's API with the real engine: the same pixels as OpenAI's routes, inpainting, and two real clients."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.live import BUILTIN_NAME, LiveServer

PROMPT = "a green circle on a blue background"
KEY = "sk-test"
BEARER = {"authorization": f"Bearer {KEY}"}
SMALL = {"width": 128, "height": 128, "steps": 4, "seed": 5, "cfg_scale": 3, "sampler_name": "DDIM"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer("--api_key", KEY, spool=tmp_path_factory.mktemp("spool")) as live:
        yield live


@pytest.fixture
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, auth=("anyone", KEY), timeout=120) as client:
        yield client


def make(client: httpx.Client, task: str, **fields: Any) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Return the pixels of the first picture and `info`."""
    reply = client.post(f"/sdapi/v1/{task}", json={"prompt": PROMPT, **SMALL, **fields})
    assert reply.status_code == 200, reply.text
    return pixels(reply.json()["images"][0]), json.loads(reply.json()["info"])


def pixels(text: str) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB"))


def png(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(png(array)).decode()


def picture(width: int = 200, height: int = 160) -> np.ndarray[Any, Any]:
    """Return a gradient with noise: every pixel that is changed shows."""
    noise = np.random.default_rng(1).integers(0, 60, (height, width, 3))
    return (noise + np.linspace(0, 190, width)[None, :, None]).astype(np.uint8)


def box_mask(left: int, top: int, right: int, bottom: int, width: int = 200, height: int = 160) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def test_txt2img_makes_the_pixels_of_the_generations_route(client: httpx.Client) -> None:
    found, info = make(client, "txt2img")
    body = {"prompt": PROMPT, "size": "128x128", "num_inference_steps": 4, "seed": 5, "guidance_scale": 3}
    reply = client.post("/v1/images/generations", json={**body, "scheduler": "ddim"})
    assert np.array_equal(found, pixels(reply.json()["data"][0]["b64_json"]))
    assert (info["sampler_name"], info["width"], info["sd_model_name"]) == ("DDIM", 128, BUILTIN_NAME)
    assert info["infotexts"][0].splitlines()[-1].startswith("Steps: 4, Sampler: ddim, CFG scale: 3, Seed: 5,")


def test_img2img_makes_the_pixels_of_the_edits_route(client: httpx.Client) -> None:
    source, mask = picture(128, 128), box_mask(30, 30, 90, 90, 128, 128)
    found, _ = make(
        client, "img2img", init_images=[encoded(source)], mask=encoded(mask), denoising_strength=0.9, mask_blur=3,
        inpaint_full_res=False, inpainting_fill=1, resize_mode=1,
    )  # fmt: skip
    reply = client.post(
        "/v1/images/edits",
        files={"image": ("a.png", png(source)), "mask": ("m.png", png(mask))},
        data={
            "prompt": PROMPT, "size": "128x128", "num_inference_steps": "4", "seed": "5", "guidance_scale": "3",
            "scheduler": "ddim", "strength": "0.9", "mask_blur": "3",
        },
    )  # fmt: skip
    assert np.array_equal(found, pixels(reply.json()["data"][0]["b64_json"]))


@pytest.mark.parametrize("invert", [0, 1])
def test_full_resolution_keeps_the_size_and_the_pixels_outside_the_mask(client: httpx.Client, invert: int) -> None:
    source, mask = picture(), box_mask(60, 40, 110, 90)
    found, info = make(
        client, "img2img", init_images=["data:image/png;base64," + encoded(source)], mask=encoded(mask),
        inpaint_full_res_padding=8, mask_blur=2, inpainting_mask_invert=invert, denoising_strength=1,
    )  # fmt: skip
    repainted = (mask > 0) if not invert else (mask == 0)
    assert found.shape == source.shape
    assert (info["width"], info["height"]) == (200, 160)
    assert np.array_equal(found[~repainted], source[~repainted])
    assert (found[repainted] != source[repainted]).any(1).mean() > 0.9


def test_img2img_of_a_transparent_image_edits_all_of_it(client: httpx.Client) -> None:
    source = np.dstack([picture(128, 128), np.zeros((128, 128), np.uint8)])
    found, _ = make(client, "img2img", init_images=[encoded(source)], denoising_strength=0.5)
    white, _ = make(
        client, "img2img", init_images=[encoded(np.full((128, 128, 3), 255, np.uint8))], denoising_strength=0.5
    )
    assert np.array_equal(found, white)  # as there, transparent pixels are shown on white


def test_png_info_reads_the_parameters_of_each_format(client: httpx.Client) -> None:
    for form in ("png", "jpg", "webp"):
        reply = client.post(
            "/sdapi/v1/txt2img",
            json={"prompt": PROMPT, **SMALL, "negative_prompt": "red", "override_settings": {"samples_format": form}},
        ).json()
        text = json.loads(reply["info"])["infotexts"][0]
        found = client.post("/sdapi/v1/png-info", json={"image": reply["images"][0]}).json()
        assert found["info"] == text
        assert found["parameters"]["Prompt"] == PROMPT
        assert found["parameters"]["Negative prompt"] == "red"
        assert (found["parameters"]["Seed"], found["parameters"]["Size-1"]) == ("5", "128")


# --- real clients -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the clients' own
def test_webuiapi_is_served(live: LiveServer) -> None:
    import webuiapi

    api = webuiapi.WebUIApi(port=live.port, username="anyone", password=KEY, sampler="Euler", steps=4)
    assert api.util_get_model_names() == [BUILTIN_NAME]
    assert {"Euler", "Euler a", "DPM++ 2M"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    api.util_set_model(BUILTIN_NAME)
    assert api.util_get_current_model() == BUILTIN_NAME
    api.util_wait_for_ready(check_interval=0.1)
    made = api.txt2img(prompt=PROMPT, negative_prompt="red", seed=3, width=128, height=128, batch_size=2)
    assert [image.size for image in made.images] == [(128, 128)] * 2
    assert (made.info["all_seeds"], made.info["ignored"]) == ([3, 4], [])
    assert made.parameters["negative_prompt"] == "red"
    mask = Image.fromarray(box_mask(60, 40, 110, 90))
    edited = api.img2img(
        images=[Image.fromarray(picture())], mask_image=mask, prompt=PROMPT, seed=3, width=128, height=128,
        inpaint_full_res_padding=8, denoising_strength=0.9,
    )  # fmt: skip
    assert edited.image.size == (200, 160)
    assert edited.info["ignored"] == []
    assert api.png_info(made.image).info.startswith(PROMPT)
    assert api.interrupt() == {}
    assert api.get_progress()["state"]["job_count"] == 0
    with pytest.raises(RuntimeError, match="enable_hr"):
        api.txt2img(prompt=PROMPT, enable_hr=True)


@pytest.mark.filterwarnings("ignore")
def test_sd_backend_client_is_served(live: LiveServer) -> None:
    from sd_backend_client.api.a1111_webservice import A1111Webservice
    from sd_backend_client.api.webui.diffusion_request_body import DiffusionRequestBody

    service = A1111Webservice(live.url, credentials_provider=lambda: ("anyone", KEY))
    assert [option.name for option in service.list_checkpoints()] == [BUILTIN_NAME]
    assert "euler_ancestral" in [option.name for option in service.list_samplers()]
    assert [option.name for option in service.list_schedulers()] == ["automatic", "uniform", "karras"]
    body = DiffusionRequestBody(prompt=PROMPT, width=128, height=128, steps=4, seed=7)
    handle = service.submit_txt2img(body)
    assert 0 <= (handle.poll().overall_progress or 0) <= 1
    made = handle.wait()
    assert (made.seeds, made.images[0].size) == ([7], (128, 128))
    inpainting = DiffusionRequestBody(
        prompt=PROMPT, width=128, height=128, steps=4, seed=7, init_images=[Image.fromarray(picture())],
        mask=Image.fromarray(box_mask(60, 40, 110, 90)), inpaint_full_res=True, inpaint_full_res_padding=16,
    )  # fmt: skip
    edited = service.submit_inpaint(inpainting).wait().images[0]
    assert edited.size == (200, 160)
    assert np.array_equal(np.asarray(edited.convert("RGB"))[:40], picture()[:40])


@pytest.mark.filterwarnings("ignore")
def test_sd_backend_client_sees_previews_and_cancels(live: LiveServer) -> None:
    from sd_backend_client.api.a1111_webservice import A1111Webservice
    from sd_backend_client.api.webui.diffusion_request_body import DiffusionRequestBody

    service = A1111Webservice(live.url, credentials_provider=lambda: ("anyone", KEY))
    handle = service.submit_txt2img(DiffusionRequestBody(prompt=PROMPT, width=256, height=256, steps=100, seed=7))
    deadline = time.monotonic() + 60
    while handle.poll().preview is None:
        assert time.monotonic() < deadline, "no preview within 60 s"
    assert handle.poll().preview.size[0] > 8
    assert handle.cancel()
    with pytest.raises(Exception, match=r"(?i)cancel|interrupt"):
        handle.wait()
    assert httpx.get(f"{live.url}/sdapi/v1/progress", headers=BEARER).json()["state"]["job_count"] == 0
