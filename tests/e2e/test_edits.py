"""Edits through the official OpenAI client, on the built-in model in a real worker: faithful, exact, reproducible."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image, ImageOps

from ovserve.pixels.heic import reads_heic
from tests.live import LiveServer
from tests.reader import Figure, draw_scene, read_picture

PROMPT = "a green circle on a blue background"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v3", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def pixels(item: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))))


def test_png_edit_follows_the_prompt_on_nine_of_ten_seeds(client: openai.OpenAI, data: Path) -> None:
    followed = 0
    for seed in range(10):
        with (data / "red_circle.png").open("rb") as image:
            reply = client.images.edit(image=image, prompt=PROMPT, extra_body={"strength": 0.7, "seed": seed})
        scene = read_picture(pixels(reply.data[0]))
        followed += scene.background == "blue" and [o.colour for o in scene.objects] == ["green"]
    assert followed >= 9


def test_jpeg_is_turned_upright_by_its_exif_orientation(client: openai.OpenAI, data: Path) -> None:
    source = ImageOps.exif_transpose(Image.open(data / "rotated_star.jpg"))
    with (data / "rotated_star.jpg").open("rb") as image:
        reply = client.images.edit(
            image=image, prompt="a yellow star on a purple background", extra_body={"strength": 0.3, "seed": 1}
        )
    result = pixels(reply.data[0])
    assert result.shape[:2] == (source.height, source.width)
    star, source_star = read_picture(result).objects[0], read_picture(np.asarray(source)).objects[0]
    assert star.colour == "yellow"
    assert abs(star.y - source_star.y) < 0.15 * source.height


def test_webp_is_accepted(client: openai.OpenAI, data: Path) -> None:
    with (data / "pair.webp").open("rb") as image:
        reply = client.images.edit(
            image=image, prompt="a green square and a pink heart on a white background", extra_body={"strength": 0.3}
        )
    assert pixels(reply.data[0]).shape == (256, 256, 3)


@pytest.mark.skipif(not reads_heic(), reason="the extra heic is not installed")
def test_heic_is_decoded_upright(client: openai.OpenAI, data: Path) -> None:
    image = ("photo.heic", (data / "heic" / "rotated.heic").read_bytes(), "image/heic")
    reply = client.images.edit(image=image, prompt=PROMPT, extra_body={"strength": 0})
    result = pixels(reply.data[0])
    assert result.shape == (64, 48, 3)
    assert np.abs(result[3, -4].astype(int) - (200, 30, 30)).max() <= 3  # red: upper left before it was turned


@pytest.mark.parametrize("style", ["mask_alpha.png", "mask_white.png"])
def test_mask_repaints_inside_and_keeps_outside_bit_for_bit(client: openai.OpenAI, data: Path, style: str) -> None:
    source = np.asarray(Image.open(data / "red_circle.png"))
    inside = np.zeros(source.shape[:2], bool)
    inside[48:208, 48:208] = True
    followed = 0
    for seed in range(6):
        with (data / "red_circle.png").open("rb") as image, (data / style).open("rb") as mask:
            reply = client.images.edit(
                image=image, mask=mask, prompt="a yellow star on a blue background", extra_body={"seed": seed}
            )
        result = pixels(reply.data[0])
        assert np.array_equal(result[~inside], source[~inside])
        assert not np.array_equal(result[inside], source[inside])
        scene = read_picture(result)
        followed += [(o.colour, o.shape) for o in scene.objects] == [("yellow", "star")]
    assert followed >= 5


def test_alpha_and_white_masks_give_equal_results(client: openai.OpenAI, data: Path) -> None:
    results = []
    for style in ("mask_alpha.png", "mask_white.png"):
        with (data / "red_circle.png").open("rb") as image, (data / style).open("rb") as mask:
            reply = client.images.edit(
                image=image, mask=mask, prompt="a white cross on a blue background", extra_body={"seed": 3}
            )
        results.append(reply.data[0].b64_json)
    assert results[0] == results[1]


def test_transparent_pixels_of_the_image_are_the_default_mask(client: openai.OpenAI, data: Path) -> None:
    source = np.asarray(Image.open(data / "mask_alpha.png"))
    hole = source[..., 3] == 0
    followed = 0
    for seed in range(4, 10):
        with (data / "mask_alpha.png").open("rb") as image:
            reply = client.images.edit(
                image=image, prompt="a white cross on a blue background", extra_body={"seed": seed}
            )
        result = pixels(reply.data[0])
        assert np.array_equal(result[~hole][:, :3], source[~hole][:, :3])
        followed += [(o.colour, o.shape) for o in read_picture(result[..., :3]).objects] == [("white", "cross")]
    assert followed >= 5


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_bytes(client: openai.OpenAI, data: Path) -> None:
    def edit(seed: int) -> str:
        with (data / "red_circle.png").open("rb") as image:
            reply = client.images.edit(image=image, prompt=PROMPT, extra_body={"rng_seed": seed})
        assert reply.data[0].model_extra["seed"] == seed
        return reply.data[0].b64_json

    assert edit(5) == edit(5)
    assert edit(5) != edit(6)


@pytest.mark.parametrize("masked", [False, True])
def test_each_of_four_pictures_can_be_reproduced_alone(client: openai.OpenAI, data: Path, masked: bool) -> None:
    def edit(n: int, **extra: int) -> Any:
        with (data / "red_circle.png").open("rb") as image, (data / "mask_alpha.png").open("rb") as mask:
            more = {"mask": mask} if masked else {}
            return client.images.edit(image=image, prompt=PROMPT, n=n, extra_body=extra, **more).data

    four = edit(4)
    assert len({item.b64_json for item in four}) == 4
    seeds = [item.model_extra["seed"] for item in four]
    assert seeds == [(seeds[0] + k) % 2**32 for k in range(4)]
    for item, seed in zip(four, seeds, strict=True):
        assert edit(1, seed=seed)[0].b64_json == item.b64_json


@pytest.mark.parametrize("size", ["96x160", "200x200", "128x128", "301x77", "auto"])
def test_requested_size_is_exact(client: openai.OpenAI, data: Path, size: str) -> None:
    with (data / "red_circle.png").open("rb") as image:
        reply = client.images.edit(image=image, prompt=PROMPT, size=size)  # type: ignore[arg-type]
    result = pixels(reply.data[0])
    wanted = (256, 256) if size == "auto" else tuple(int(side) for side in size.split("x"))
    assert (result.shape[1], result.shape[0]) == wanted
    assert reply.size == f"{wanted[0]}x{wanted[1]}"


def test_response_reports_parameters_usage_and_timing(client: openai.OpenAI, data: Path) -> None:
    with (data / "red_circle.png").open("rb") as image:
        raw = client.images.with_raw_response.edit(image=image, prompt=PROMPT, model="ovserve-builtin")
    reply = raw.parse()
    assert reply.created > 1_700_000_000
    assert (reply.background, reply.output_format, reply.quality, reply.size) == ("opaque", "png", "high", "256x256")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.usage.input_tokens_details.text_tokens == 9
    assert raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) > 0
    assert "denoise;dur=" in raw.headers["server-timing"]


def test_file_metadata_has_prompt_and_seed_unless_disabled(client: openai.OpenAI, data: Path) -> None:
    with (data / "red_circle.png").open("rb") as image:
        item = client.images.edit(image=image, prompt=PROMPT, extra_body={"seed": 11}).data[0]
    text = Image.open(io.BytesIO(base64.b64decode(item.b64_json))).info["parameters"]
    assert PROMPT in text
    assert "Seed: 11" in text
    with (data / "red_circle.png").open("rb") as image:
        item = client.images.edit(image=image, prompt=PROMPT, extra_body={"seed": 11, "metadata": False}).data[0]
    assert "parameters" not in Image.open(io.BytesIO(base64.b64decode(item.b64_json))).info


def test_generations_and_variations_are_served(client: openai.OpenAI, data: Path) -> None:
    item = client.images.generate(prompt="a pink heart on a black background", extra_body={"seed": 2}).data[0]
    scene = read_picture(pixels(item))
    assert (scene.background, scene.objects[0].colour, scene.objects[0].shape) == ("black", "pink", "heart")
    with (
        (data / "red_circle.png").open("rb") as image,
        pytest.warns(DeprecationWarning, match="deprecated"),
    ):  # OpenAI has deprecated its endpoint
        varied = client.images.create_variation(image=image).data[0]
    assert pixels(varied).shape == (256, 256, 3)


@pytest.mark.parametrize("path", ["/v1", "/v3", ""])
def test_every_path_prefix_is_served(server: LiveServer, data: Path, path: str) -> None:
    with (
        openai.OpenAI(base_url=server.url + path, api_key="none", max_retries=0) as client,
        (data / "red_circle.png").open("rb") as image,
    ):
        assert client.images.edit(image=image, prompt=PROMPT).data
        assert [model.id for model in client.models.list()] == ["ovserve-builtin"]
        assert client.models.retrieve("ovserve-builtin").id == "ovserve-builtin"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("ghost/model")


def test_errors_map_to_the_client_exception_classes(client: openai.OpenAI, data: Path) -> None:
    with (data / "red_circle.png").open("rb") as image, pytest.raises(openai.BadRequestError) as bad:
        client.images.edit(image=image, prompt=PROMPT, n=11)
    assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
    with (data / "red_circle.png").open("rb") as image, pytest.raises(openai.NotFoundError) as missing:
        client.images.edit(image=image, prompt=PROMPT, model="ghost")
    assert missing.value.code == "model_not_found"


def test_too_long_prompt_is_cut_unless_truncate_prompt_is_false(client: openai.OpenAI, data: Path) -> None:
    prompt = "red " * 60
    with (data / "red_circle.png").open("rb") as image, pytest.raises(openai.BadRequestError, match="32") as caught:
        client.images.edit(image=image, prompt=prompt, extra_body={"truncate_prompt": False})
    assert caught.value.code == "prompt_too_long"
    for extra in ({"truncate_prompt": True}, {}):
        with (data / "red_circle.png").open("rb") as image:
            item = client.images.edit(image=image, prompt=prompt, extra_body=extra).data[0]
        assert 0 < len(item.revised_prompt) < len(prompt)


def test_unknown_words_do_not_disturb_the_builtin_model(client: openai.OpenAI) -> None:
    prompt = (
        "A minimalist, hyper-detailed flat illustration of a vibrant yellow heart with crisp edges, centered on a "
        "solid purple background, masterpiece, trending on artstation, award-winning composition, volumetric lighting"
    )
    reply = client.images.generate(prompt=prompt, size="256x256", n=3, extra_body={"seed": 1})
    used = reply.data[0].revised_prompt
    assert used.startswith("A, detailed flat illustration of a yellow heart with, on a purple background")
    scenes = [read_picture(pixels(item)) for item in reply.data]
    shown = [(scene.background, scene.largest.colour, scene.largest.shape) for scene in scenes if scene.largest]
    assert ("purple", "yellow", "heart") in shown


def test_corrupt_image_does_not_end_a_worker(server: LiveServer, client: openai.OpenAI, data: Path) -> None:
    workers = server.workers()
    whole = (data / "red_circle.png").read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:200] + b"\0" * 400, whole[:-30]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(image=broken, prompt=PROMPT)
        assert caught.value.code == "invalid_image_file"
        assert caught.value.param == "image"
    assert server.workers() == workers


def test_thin_mask_is_repainted(client: openai.OpenAI) -> None:
    source = draw_scene("blue", [Figure("red", "circle", 64, 64, 34)])
    mask = np.zeros((128, 128), np.uint8)
    mask[60:63, 20:110] = 255
    stream, mask_stream = io.BytesIO(), io.BytesIO()
    Image.fromarray(source).save(stream, "PNG")
    Image.fromarray(mask).save(mask_stream, "PNG")
    item = client.images.edit(
        image=stream.getvalue(), mask=mask_stream.getvalue(), prompt="blue background", extra_body={"seed": 1}
    ).data[0]
    result = pixels(item)
    assert np.array_equal(result[mask == 0], source[mask == 0])
    assert not np.array_equal(result[mask == 255], source[mask == 255])
