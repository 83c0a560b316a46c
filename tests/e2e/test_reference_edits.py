"""A server with a model that edits by reference: several images, masks, and a mixed load that equals solo runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ovserve.engines.protocol import Pixels
from tests.live import LiveServer
from tests.pictures import image_of
from tests.tinymodels import tiny_model

Files = list[tuple[str, tuple[str, bytes, str]]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    # One stream: a small model with a text encoder of thirty layers is compiled once for each.
    options = ("--streams", "1", "--threads", "1", "--max_batch", "4", "--queue_limit", "16", "--engine", "auto")
    path = str(tiny_model("klein"))
    with LiveServer(*options, "--model_path", path, spool=tmp_path_factory.mktemp("spool")) as live:
        yield live


def png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def pixels_of(data: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def white_below(width: int, height: int, row: int) -> Pixels:
    """Return a mask that repaints everything from `row` on."""
    mask = np.zeros((height, width), np.uint8)
    mask[row:] = 255
    return mask


@dataclass(frozen=True)
class Edit:
    """One request: `references` images, `steps`, and a mask from row `masked_from` on, or none."""

    references: int
    steps: int
    masked_from: int = 0
    seed: int = 1

    def send(self, url: str, **options: str) -> dict[str, Any]:
        images = [image_of(64, 64, self.seed + k) if k else image_of(64, 96, self.seed) for k in range(self.references)]
        files: Files = [("image[]", (f"{k}.png", png(each), "image/png")) for k, each in enumerate(images)]
        if self.masked_from:
            mask = white_below(64, 96, self.masked_from)
            files.append(("mask", ("mask.png", png(mask), "image/png")))
        fields = {"prompt": f"number {self.seed}", "num_inference_steps": str(self.steps), "seed": str(self.seed)}
        fields |= options
        reply = httpx.post(f"{url}/v1/images/edits", data=fields, files=files, timeout=300)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    @property
    def source(self) -> Pixels:
        return image_of(64, 96, self.seed)


MIXED = (
    Edit(1, 4, seed=11),
    Edit(2, 3, seed=12),
    Edit(1, 6, masked_from=48, seed=13),
    Edit(4, 2, seed=14),
    Edit(2, 5, masked_from=32, seed=15),
    Edit(1, 4, seed=16),
    Edit(3, 4, seed=17),
    Edit(2, 4, masked_from=80, seed=18),
)


def picture(reply: dict[str, Any], index: int = 0) -> bytes:
    return base64.b64decode(reply["data"][index]["b64_json"])


def test_every_picture_of_a_mixed_load_equals_its_solo_run(server: LiveServer) -> None:
    with ThreadPoolExecutor(len(MIXED)) as pool:
        together = list(pool.map(lambda edit: edit.send(server.url), MIXED))
    for edit, reply in zip(MIXED, together, strict=True):
        np.testing.assert_array_equal(pixels_of(picture(reply)), pixels_of(picture(edit.send(server.url))))
    assert len({picture(reply) for reply in together}) == len(MIXED)


@pytest.mark.parametrize("edit", [each for each in MIXED if each.masked_from], ids=str)
def test_outside_the_mask_are_the_callers_own_pixels(server: LiveServer, edit: Edit) -> None:
    pixels = pixels_of(picture(edit.send(server.url)))
    np.testing.assert_array_equal(pixels[: edit.masked_from], edit.source[: edit.masked_from])
    assert (pixels[edit.masked_from :] != edit.source[edit.masked_from :]).mean() > 0.5


def test_pictures_of_one_masked_edit_keep_the_callers_pixels_and_equal_single_edits(server: LiveServer) -> None:
    edit = Edit(2, 3, masked_from=40, seed=41)
    reply = edit.send(server.url, n="3")
    pictures = [pixels_of(picture(reply, index)) for index in range(3)]
    for index, pixels in enumerate(pictures):
        np.testing.assert_array_equal(pixels[:40], edit.source[:40])
        np.testing.assert_array_equal(pixels, pixels_of(picture(edit.send(server.url, seed=str(41 + index)))))
    assert len({each.tobytes() for each in pictures}) == 3


def test_seam_of_a_masked_edit_is_soft(server: LiveServer) -> None:
    edit = Edit(1, 3, masked_from=40, seed=43)
    hard, soft = (pixels_of(picture(edit.send(server.url, mask_blur=blur))) for blur in ("0", "12"))
    np.testing.assert_array_equal(soft[:40], edit.source[:40])
    np.testing.assert_array_equal(soft[53:], hard[53:])
    changes = [np.abs(pixels[40].astype(int) - edit.source[40]).mean() for pixels in (soft, hard)]
    assert changes[0] < changes[1] / 2


def test_usage_counts_the_tokens_of_all_references(server: LiveServer) -> None:
    tokens = [Edit(n, 1, seed=3).send(server.url)["usage"]["input_tokens_details"]["image_tokens"] for n in (1, 3)]
    assert tokens == [64 * 96 // 256, (64 * 96 + 2 * 64 * 64) // 256]


def test_order_of_the_references_matters_and_sixteen_are_taken(server: LiveServer) -> None:
    files: Files = [("image[]", (f"{k}.png", png(image_of(64, 64, k)), "image/png")) for k in range(16)]
    fields = {"prompt": "join them", "num_inference_steps": "2", "seed": "5", "size": "64x64"}
    replies = []
    for chosen in (files, [files[0], *reversed(files[1:])], files[:4]):
        reply = httpx.post(f"{server.url}/v1/images/edits", data=fields, files=chosen, timeout=300)
        assert reply.status_code == 200, reply.text
        replies.append(picture(reply.json()))
    assert len(set(replies)) == 3
    reply = httpx.post(f"{server.url}/v1/images/edits", data=fields, files=[*files, files[0]], timeout=300)
    assert reply.status_code == 400
    assert "16" in reply.json()["error"]["message"]


def test_official_clients_example_with_four_images_works(server: LiveServer) -> None:
    # The example of OpenAI's guide: a gift basket made of four pictures.
    images = [
        (name, png(image_of(64, 64, k)), "image/png") for k, name in enumerate(("a.png", "b.png", "c.png", "d.png"))
    ]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        result = client.images.edit(
            model="klein",
            image=images,
            prompt="Generate a photorealistic image of a gift basket with all items in the reference pictures.",
            size="64x64",
            n=2,
            extra_body={"seed": 9},
        )
    assert result.data is not None
    assert len(result.data) == 2
    shapes = {pixels_of(base64.b64decode(each.b64_json or "")).shape for each in result.data}
    assert shapes == {(64, 64, 3)}


def test_references_in_a_json_body_are_those_of_a_form(server: LiveServer) -> None:
    edit = Edit(2, 2, seed=21)
    images = [image_of(64, 96, 21), image_of(64, 64, 22)]
    urls = [{"image_url": "data:image/png;base64," + base64.b64encode(png(each)).decode()} for each in images]
    body = {"prompt": "number 21", "num_inference_steps": 2, "seed": 21, "images": urls}
    reply = httpx.post(f"{server.url}/v1/images/edits", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    assert picture(reply.json()) == picture(edit.send(server.url))


def test_previews_of_a_masked_edit_keep_the_callers_pixels(server: LiveServer) -> None:
    edit = Edit(2, 5, masked_from=48, seed=31)
    images = [(f"{k}.png", png(each), "image/png") for k, each in enumerate((edit.source, image_of(64, 64, 32)))]
    mask = ("mask.png", png(white_below(64, 96, 48)), "image/png")
    previews, final = [], b""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        stream = client.images.edit(
            model="klein",
            image=images,
            mask=mask,
            prompt="number 31",
            stream=True,
            partial_images=2,
            extra_body={"seed": 31, "num_inference_steps": 5},
        )
        for event in stream:
            data = base64.b64decode(event.b64_json)
            if event.type == "image_edit.partial_image":
                previews.append(pixels_of(data))
            else:
                final = data
    assert final == picture(edit.send(server.url))
    assert len(previews) == 2
    for preview in previews:
        np.testing.assert_array_equal(preview[:48], edit.source[:48])
        assert (preview[48:] != pixels_of(final)[48:]).mean() > 0.05
